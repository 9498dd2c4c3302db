"""What the machine cannot hold is refused before text is read, in GiB; what it can is not."""

from __future__ import annotations

import pytest

from nspec.run import machine
from nspec.run.config import Config

GIB = 2**30


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 8 GiB and 2 cores without a GPU."""
    monkeypatch.setattr(machine, "memory", lambda: 8 * GIB)
    monkeypatch.setattr(machine, "cores", lambda: 2)
    monkeypatch.setattr(machine, "_DEVICES", ())
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)


def sized(**sizes: int) -> Config:
    config = Config()
    for key, value in sizes.items():
        setattr(config.model, key, value)
    return config


def test_parameters_are_those_of_the_model_that_is_built(tmp_path) -> None:
    from nspec.mt.model import build_model
    from nspec.mt.text import vocabulary
    from nspec.mt.text.config import TokenizerConfig

    config = sized(d_model=16, d_ff=40, heads=2, encoder_layers=2, decoder_layers=3, max_positions=32)
    pieces = vocabulary.train_sentencepiece(["ab ba aab bba"] * 9, TokenizerConfig(vocab_size=12))
    vocabulary.export_tokenizer(pieces, ["de", "en"], tmp_path)
    model = build_model(config.model, vocabulary.load_tokenizer(tmp_path), 1)
    config.tokenizer.vocab_size = model.get_input_embeddings().num_embeddings
    assert machine.parameters(config) == sum(parameter.numel() for parameter in model.parameters())


def test_a_model_that_memory_cannot_hold_is_refused_in_gib(small: None) -> None:
    config = sized(d_model=65536, d_ff=2**20, encoder_layers=1000, decoder_layers=1000)
    with pytest.raises(ValueError) as caught:
        machine.check_machine(config)
    assert str(caught.value).startswith("model.d_model, model.d_ff, ")
    assert " GiB, this machine has 8.0 GiB; make the model smaller" in str(caught.value)


@pytest.mark.parametrize(("layers", "processes", "fits"), [(6, 1, True), (70, 1, True), (80, 1, False), (70, 2, False)])
def test_weights_gradients_and_moments_take_16_bytes_a_parameter(
    layers: int, processes: int, fits: bool, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = sized(encoder_layers=layers, decoder_layers=layers)  # 7.4 million parameters for each layer of both sides
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    if fits:
        machine.check_machine(config)
        return
    with pytest.raises(ValueError, match=r"GiB, this machine has 8\.0 GiB"):
        machine.check_machine(config)


def test_with_a_gpu_only_the_weights_must_fit_into_main_memory(
    small: None, monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    config = sized(encoder_layers=80, decoder_layers=80)
    monkeypatch.setattr(machine, "_DEVICES", (str(tmp_path),))
    machine.check_machine(config)
    config.run.device = "cpu"
    with pytest.raises(ValueError, match="optimiser of "):
        machine.check_machine(config)


def test_a_pretrained_model_has_its_own_size(small: None) -> None:
    config = sized(d_model=65536, d_ff=2**20, encoder_layers=1000, decoder_layers=1000)
    config.model.pretrained = "folder"
    machine.check_machine(config)


def test_threads_are_four_a_core_at_most(small: None) -> None:
    machine.check_threads(8)
    with pytest.raises(
        ValueError, match=r"^run\.threads \(--threads\): expected at most 8, .* the 2 cores here, found 9"
    ):
        machine.check_threads(9)


def test_text_to_profile_must_be_there_before_training(small: None, tmp_path) -> None:
    config = Config()
    config.run.variants = [f"news = forward profile.path={tmp_path / 'gone'}"]
    with pytest.raises(ValueError, match=r"^profile\.path: .*gone does not exist"):
        machine.check_machine(config)
    config.run.variants = [f"news = forward profile.path={tmp_path}"]
    machine.check_machine(config)


def test_this_machine_has_memory_and_cores() -> None:
    assert GIB / 8 < machine.memory() < 2**50
    assert machine.cores() >= 1
