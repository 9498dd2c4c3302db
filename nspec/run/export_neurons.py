"""Fine-tuned neurons merged with their base: of a run of ``nspec finetune``, or that ``nspec.save_neurons`` wrote."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nspec
from nspec.files import read_json
from nspec.run.read import check_run
from nspec.serving.export import Settings, check_absent, new_folder, write

_NEURONS, _READABLE = "neurons.safetensors", "neurons.json"
_OF_TOKENIZERS = ("tokenizer*", "vocab.*", "merges.txt", "*.model", "*.spm")


def has_neurons(folder: Path) -> bool:
    """Whether a folder holds saved neurons, or is of a run of ``nspec finetune``."""
    return (folder / _NEURONS).is_file() or (folder / "base_perplexity").is_dir() or (folder / "tuned").is_dir()


def export_neurons(
    source: Path, base: str, method: str, task: str | None, out: Path | None, settings: Settings
) -> Path:
    """Writes the base with the neurons of a task in their places, or one such folder for each task.

    Args:
        source: a folder that ``nspec.save_neurons`` wrote, or a run of ``nspec finetune``.
        base: of saved neurons: the model that they are beside, a folder or a name on the hub; empty for a run.
        method: of a run: how the neurons were chosen, such as ``lape``, or ``full``; empty for saved neurons.
        task: its name; None: all.
        out: must not be there yet; None: in the folder ``export`` of a run.
        settings: of the format.

    Raises:
        ValueError: no neurons, no such method or task, no base or another one, or a folder that is there.
        ImportError: CTranslate2 is not installed.
    """
    settings.check()
    sources, base, dtype = _of_set(source, base, method) if base else _of_run(source, method)
    if task is not None and task not in sources:
        of = f" of {method}" if method else ""
        raise ValueError(f"--task {task}: {source} has {', '.join(sources)}{of}")
    if out is None and not (source / "tuned").is_dir():
        raise ValueError("give --out FOLDER, where the merged model goes")
    kind = f"{settings.format}-{settings.quantization}" if settings.quantization else settings.format
    place = out if out is not None else source / "export" / f"{method}-{kind}" / (task or "all")
    check_absent(place)
    settings = replace(settings, base=base)
    with new_folder(place) as part:
        for each in sources if task is None else [task]:
            folder = part if task is not None else part / each
            folder.mkdir(exist_ok=True)
            _write(each, sources[each], base, dtype, folder, settings)
    return place


def _write(task: str, source: Path, base: str, dtype: str, folder: Path, settings: Settings) -> None:
    if (source / _NEURONS).is_file():
        model = _model(base, dtype)
        nspec.load_neurons(model, source)
    else:
        model = _model(str(source / "model"), "auto")
    write(model, [task], folder, settings, _tokenizer(base))


def _of_set(source: Path, base: str, method: str) -> tuple[dict[str, Path], str, str]:
    if not (source / _NEURONS).is_file():
        run = (source / "config.yaml").is_file()
        raise ValueError(
            f"--base goes with saved neurons, and {source} is a run, which knows its base: leave --base out"
            if run
            else f"{source} has no saved neurons: {_NEURONS}, which nspec.save_neurons writes, is not there"
        )
    if method:
        raise ValueError(f"--system {method} goes with a run, and {source} has saved neurons: leave --system out")
    if not (source / _READABLE).is_file():
        raise ValueError(f"{source / _READABLE}, which names the tasks, is not there: copy the whole folder again")
    described = read_json(source / _READABLE)
    tasks: Any = described.get("tasks") if isinstance(described, dict) else None
    if not isinstance(tasks, list) or not tasks:
        raise ValueError(f"{source / _READABLE} names no tasks; save the neurons again")
    return {str(task): source for task in tasks}, base, "auto"


def _of_run(source: Path, method: str) -> tuple[dict[str, Path], str, str]:
    from nspec.run.finetune_config import load

    if (source / _NEURONS).is_file():
        raise ValueError(
            f"{source} has neurons without a model: give --base, the one that they were trained on{_way(source)}"
        )
    check_run(source, "RUN")
    config = load(source / "config.yaml")
    methods = _names(source / "tuned")
    if method not in methods:
        given = f"--system {method}" if method else "give --system"
        raise ValueError(f"{given}: {source} has fine-tuned by {', '.join(methods) or 'no method'}")
    found = {name: source / "tuned" / method / name for name in _names(source / "tuned" / method)}
    ready = {name: path for name, path in found.items() if (path / _NEURONS).is_file() or (path / "model").is_dir()}
    if not ready:
        reason = (
            "its LoRA weights are merged by peft (PeftModel.merge_and_unload)" if method == "lora" else "none is kept"
        )
        raise ValueError(f"--system {method} has no model or neurons to export: {reason}")
    own = config.model
    base, dtype = (own.pretrained, own.dtype) if own.pretrained else (str(source / "base" / "model"), "auto")
    return ready, base, dtype


def _way(neurons: Path) -> str:
    """How the run is exported that neurons in a folder are of; empty where they are of none."""
    task = neurons.resolve()
    method, run = task.parent, task.parent.parent.parent
    if method.parent != run / "tuned" or not (run / "config.yaml").is_file():
        return ""
    return f", or export them from their run: nspec export {run} --system {method.name} --task {task.name}"


def _names(folder: Path) -> list[str]:
    listed: Iterable[Path] = folder.iterdir() if folder.is_dir() else ()
    return sorted(path.name for path in listed if (path / "stage.json").is_file() or any(path.glob("*/stage.json")))


def _model(source: str, dtype: str) -> Any:
    """A language model, or one of encoder and decoder."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    from nspec.mt.model_files import load_config, quiet_transformers, reading

    kind: Any = AutoModelForSeq2SeqLM if load_config(source).is_encoder_decoder else AutoModelForCausalLM
    with quiet_transformers(), reading("model", source):
        return kind.from_pretrained(source, dtype=dtype).eval()


def _tokenizer(source: str) -> Any:
    """That beside a model; None where there is no file of one."""
    from transformers import AutoTokenizer

    from nspec.mt.model_files import reading

    if Path(source).is_dir() and not any(any(Path(source).glob(name)) for name in _OF_TOKENIZERS):
        return None
    with reading("tokenizer", source, "; it needs tokenizer.json and tokenizer_config.json, or what its class has"):
        return AutoTokenizer.from_pretrained(source)
