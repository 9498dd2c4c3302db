"""What would be an error of a run after hours of training, found out before: model, text, families, precision."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nspec.run.checks import check_layers
from nspec.run.config import Config
from nspec.run.stages import trained_systems
from nspec.run.systems import config_of, masked_systems, system_names, system_of

if TYPE_CHECKING:
    from torch import nn


def check_pretrained(config: Config) -> None:
    """Loads ``model.pretrained`` and tries what the run will do with it, before any text is read.

    Raises:
        ValueError: what :func:`nspec.mt.model.build_model` and :func:`check_model` raise, and no tokenizer.
    """
    from nspec.mt.model import build_model
    from nspec.mt.text.vocabulary import load_tokenizer

    tokenizer = load_tokenizer(config.model.pretrained)
    check_model(config, build_model(config.model, tokenizer, config.run.seed))


def check_model(config: Config, model: nn.Module) -> None:
    """Tries on a few tokens what the systems of the run will do with a model; its weights stay as they are.

    Raises:
        ValueError: it has no feed-forward layers that are found or chosen, what they compute is not elementwise, or
            adapters or masks of weights find no layers.
    """
    import torch

    from nspec.baselines import adapters, lass

    methods = {system_of(config, system).method for system in system_names(config)}
    try:
        with torch.random.fork_rng(devices=[]):
            if methods & {"masks", "neurons", "neurons+shared"}:
                _try_masks(config, model)
            if methods & {"adapters", "adapters+shared"}:
                adapters.add_adapters(model, {"any": "any"}, 1)
                adapters.remove_adapters(model)
            if "weight_masks" in methods:
                lass.prunable_layers(model)
    except ValueError as error:
        raise ValueError(f"model.pretrained {config.model.pretrained} does not suit run.systems: {error}") from error


def _try_masks(config: Config, model: Any) -> None:
    import torch

    import nspec

    ids = torch.full((1, 4), int(model.config.eos_token_id))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch |= {"decoder_input_ids": ids, "decoder_attention_mask": torch.ones_like(ids)}
    counts = nspec.profile(model, {"any": [batch]})
    check_layers(config, counts.layers)
    if not any(system_of(config, system).mode == "forward" for system in masked_systems(config)):
        return
    half = {name: torch.arange(len(counts["any"][name])) % 2 == 0 for name in counts.layers}
    nspec.specialize(model, nspec.NeuronMasks({"any": half}), mode="forward")
    training = model.training
    try:
        with torch.no_grad(), nspec.task(model, "any"):
            for mode in (True, False):  # dropout between fc1 and fc2 shows in training alone
                model.train(mode)(**batch)
    finally:
        model.train(training)
        nspec.despecialize(model)


def check_other_texts(config: Config, languages: list[str], tasks: list[str]) -> None:
    """Reads what the systems of a run will be profiled on, before hours of training.

    Raises:
        ValueError: as :func:`nspec.mt.text.other.read_other_text`.
    """
    from nspec.mt.text.other import read_other_text

    texts = {}
    for system in masked_systems(config):
        own = config_of(config, system)
        if own.profile.path:
            texts[own.profile.path, own.profile.path_split] = own
    for own in texts.values():
        for _ in read_other_text(own.profile, own.corpus, own.run.seed, languages, tasks):
            pass


def check_score(config: Config) -> None:
    """Raises ValueError where the tokenizer of BLEU cannot be used here."""
    if config.score.tokenize != "auto":
        from nspec.mt.scoring.bleu_tokenizer import check_tokenizer

        check_tokenizer(config.score.tokenize)


def check_adapters(config: Config, tasks: list[str]) -> None:
    """Raises ValueError where adapters of language families have a language without one."""
    for system in trained_systems(config):
        if system_of(config, system).method.startswith("adapters"):
            from nspec.run.train_systems import adapter_groups

            adapter_groups(system, config, tasks)


def check_rules(config: Config, tasks: list[str]) -> None:
    """Raises ValueError where neurons are selected by comparing directions and the run has one, or a part has none."""
    for system in masked_systems(config):
        select = config_of(config, system).select
        rule = select.sized_by
        if select.directions != "all" or (rule == "share" and select.parts):
            from nspec.run.selecting import way_of

            ways = {way_of(task, config.corpus.pivot) for task in tasks}
            if select.directions not in ("all", *ways):
                raise ValueError(
                    f"select.directions of {system} is {select.directions}, and no direction goes {select.directions} the "
                    f"pivot ({config.corpus.pivot}); take another, or other directions"
                )
        if rule in ("lape", "specific", "conflict") and len(tasks) == 1:
            option = "rule" if rule == select.rule else "like"
            raise ValueError(
                f"select.{option} of {system} is {rule}, which compares directions, and the run has {tasks[0]} alone: take "
                "share or top, or more directions"
            )


def check_precision(config: Config) -> None:
    """Raises ValueError where a system is trained in half precision on a device that has none."""
    trained = [config_of(config, name).specialize for name in trained_systems(config)]
    if any(settings.precision == "fp16" for settings in [config.train, *trained]):
        from nspec.mt.training.precision import resolve_precision
        from nspec.processes import resolve_device

        resolve_precision("fp16", resolve_device(config.run.device), 0)
