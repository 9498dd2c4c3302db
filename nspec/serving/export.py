"""A task of a model as a folder that other tools serve: the plain model, its tokenizer, and a README that says how."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from safetensors import SafetensorError

import nspec
from nspec.files import disk_error
from nspec.serving import ctranslate2, usage
from nspec.serving.card import base_name, model_card

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Format = Literal["transformers", "ctranslate2"]
FORMATS: tuple[Format, ...] = ("transformers", "ctranslate2")


@dataclass(frozen=True)
class Settings:
    """How folders are written.

    Attributes:
        format: one of :data:`FORMATS`.
        quantization: of CTranslate2; None: as the weights are.
        compact: without the neurons that the task does not use.
        beam: of the search that the README shows.
        length_penalty: likewise.
        unshown: options of the run's search that the lines of the README do not have, in words.
        base: the model before it was specialised, for the README: a name on the hub, or a path.
        system: the name of the system in its run, likewise.
    """

    format: str = "transformers"
    quantization: str | None = None
    compact: bool = True
    beam: int = 5
    length_penalty: float = 1.0
    unshown: str = ""
    base: str = ""
    system: str = ""

    def check(self) -> None:
        """Raises ValueError for a format or quantization that there is not, ImportError without CTranslate2."""
        if self.format not in FORMATS:
            raise ValueError(f"the format is {self.format!r}; expected {' or '.join(FORMATS)}")
        if self.format == "transformers":
            if self.quantization:
                raise ValueError(f"quantization {self.quantization} goes with the format ctranslate2")
            return
        ctranslate2.check(self.quantization)


def export(
    model: Any,
    task: str,
    folder: str | os.PathLike[str],
    format: Format = "transformers",
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    quantization: str | None = None,
    compact: bool = True,
    base: str = "",
) -> Path:
    """Writes what a task of a model computes as a plain model, for tools that know nothing of nspec.

    The folder holds the model as :func:`nspec.merge` makes it, the tokenizer, and a ``README.md`` with a model card and the
    lines that use it. It appears when it is whole.

    Args:
        model: a model of ``transformers`` that is specialised, has neurons of its own or masks of weights; a dense one is
            written as it is.
        task: its name, such as ``en-de``; of a direction that the tokenizer has tags for, the README translates with it.
        folder: must not be there yet.
        format: ``transformers``, or ``ctranslate2``, which must be installed.
        tokenizer: goes into the folder; CTranslate2 needs it.
        quantization: of CTranslate2, such as ``int8``; None: as the weights are.
        compact: without the masked neurons, in mode ``forward`` (``nspec.merge(..., compact=True)``).
        base: the model that was specialised, for the model card: a name on the hub, or a path, whose end alone is told.

    Returns:
        The folder.

    Raises:
        ValueError: a folder that is there, an unknown format or quantization, what :func:`nspec.merge` refuses, an unknown
            task, a model that is not of ``transformers``, or one that CTranslate2 does not convert.
        ImportError: CTranslate2 is not installed.

    Example:
        >>> import tempfile
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
        >>> masks = nspec.NeuronMasks({"cy": {"model.layers.0.mlp.gate_proj": torch.arange(32) < 20}})
        >>> model = nspec.specialize(model, masks)
        >>> with tempfile.TemporaryDirectory() as place:
        ...     folder = nspec.export(model, "cy", f"{place}/welsh")
        ...     LlamaForCausalLM.from_pretrained(folder).config.intermediate_size
        20
    """
    settings = Settings(format, quantization, compact, base=base)
    settings.check()
    _check_model(model, task)
    with new_folder(Path(folder)) as part:
        write(model, [task], part, settings, tokenizer)
    return Path(folder)


def _check_model(model: Any, task: str) -> None:
    from nspec.nn.switched import TaskSwitched
    from nspec.specialization.tasks import unknown_task

    if not hasattr(model, "save_pretrained"):
        raise ValueError(
            f"{type(model).__name__} is no model of transformers, whose formats these are: nspec.merge(model, task) "
            "gives a plain module"
        )
    if not isinstance(task, str):
        raise TypeError(f"task is {task!r}, expected the name of one, such as en-de")
    layers = [module for module in model.modules() if isinstance(module, TaskSwitched)]
    if layers and task not in layers[0].tasks:  # a dense model is written as it is
        raise ValueError(unknown_task(task, layers[0]))


def write(
    model: Any,
    tasks: Sequence[str],
    folder: Path,
    settings: Settings,
    tokenizer: Any = None,
    pieces: Path | None = None,
) -> None:
    """Fills a folder with the plain model of a task.

    Args:
        model: see :func:`export`, or one that is dense.
        tasks: the task; several of a model that computes the same for all of them.
        folder: that is there.
        settings: checked.
        tokenizer: of the model.
        pieces: a SentencePiece model that spells as the tokenizer does, to go with it.
    """
    from nspec.mt.model_files import quiet_transformers
    from nspec.mt.plain import plain

    if settings.format == "ctranslate2" and tokenizer is None:
        raise ValueError("CTranslate2 needs the vocabulary: give tokenizer=, that of the model")
    if tokenizer is not None:
        _check_rows(model, tokenizer)
    merged: Any = plain(model, tasks[0], settings.compact)
    with quiet_transformers():
        if settings.format == "ctranslate2":
            names = _names(merged, tokenizer)
            ctranslate2.convert(merged, tokenizer, folder / "model", names=names, quantization=settings.quantization)
            for path in (folder / "model").iterdir():
                path.rename(folder / path.name)
            (folder / "model").rmdir()
        else:
            cached, merged.config.use_cache = merged.config.use_cache, True  # off while training
            merged.save_pretrained(folder)
            merged.config.use_cache = cached
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    if pieces is not None:
        _check_pieces(pieces, tokenizer)
        shutil.copyfile(pieces, folder / pieces.name)
    (folder / "README.md").write_text(_readme(model, merged, tasks, settings, tokenizer, folder), encoding="utf-8")


def _check_rows(model: Any, tokenizer: Any) -> None:
    """Raises ValueError where a token has no row of the embeddings."""
    rows = int(model.get_input_embeddings().num_embeddings)
    beyond = {row: token for token, row in tokenizer.get_vocab().items() if row >= rows}
    if beyond:
        raise ValueError(
            f"the tokenizer has {len(beyond)} tokens, {beyond[min(beyond)]!r} the first, beyond the {rows} rows of the "
            "embeddings: it is another model's, or the embeddings have to be resized (model.resize_token_embeddings)"
        )


def _names(model: Any, tokenizer: Any) -> list[str]:
    from nspec.mt.text.tokenizer_fit import token_ids

    if not ctranslate2.takes_names(model):
        return []
    return ctranslate2.row_names(model, tokenizer, token_ids(tokenizer))


def _check_pieces(pieces: Path, tokenizer: Any) -> None:
    """Raises ValueError where a SentencePiece model is broken, or of another vocabulary than the tokenizer's."""
    import sentencepiece

    way = "put it back; where it is not there, the tokenizer serves in its place"
    try:
        found = sentencepiece.SentencePieceProcessor(model_file=str(pieces))
    except (RuntimeError, OSError):
        raise ValueError(f"{pieces} cannot be read as a SentencePiece model: {way}") from None
    known = tokenizer.get_vocab()
    if other := next((name for name in map(found.id_to_piece, range(len(found))) if name not in known), None):
        raise ValueError(f"{pieces} has the piece {other!r}, and the tokenizer of the model has not: {way}")


def _readme(model: Any, merged: Any, tasks: Sequence[str], settings: Settings, tokenizer: Any, folder: Path) -> str:
    from nspec.mt.languages import languages_of_task

    blocks = []
    for task in tasks[:1]:
        framed = _framed(task, merged, tokenizer, folder)
        if framed is None:
            kind = "Seq2SeqLM" if merged.config.is_encoder_decoder else "CausalLM"
            blocks.append(usage.of_other(kind, settings.format))
        else:
            lines = usage.of_ctranslate2 if settings.format == "ctranslate2" else usage.of_transformers
            blocks.append(lines(framed, settings.beam, settings.length_penalty))
    text = "\n\n".join(f"```python\n{block}\n```" for block in blocks)
    if settings.unshown:
        text += f"\n\nThe run's own search has {settings.unshown} too; these lines search without."
    if settings.system:
        text = f"The system `{settings.system}` of a run.\n\n{text}"
    if len(tasks) > 1:
        text += "\n\n" + _other_tasks(tasks, tokenizer)
    languages: list[str] = []
    if framed is not None:
        languages = list(dict.fromkeys(code for task in tasks for code in languages_of_task(task)))
    if len(tasks) == 1:  # else one model computes the same for all, and the card of one would be of no use
        with contextlib.suppress(ValueError):  # no neurons of tasks: dense, or masks of weights or heads
            return model_card(model, tasks[0], merged, base=settings.base or None, languages=languages, text=text)
    count = sum(parameter.numel() for parameter in merged.parameters())
    made = f"A model of {count:,} parameters, exported by nspec {nspec.__version__}."
    of = f" Its base is `{base_name(settings.base)}`." if settings.base else ""
    return f"# {', '.join(tasks)}\n\n{made}{of}\n\n{text}\n"


def _other_tasks(tasks: Sequence[str], tokenizer: Any) -> str:
    from nspec.mt.text.frame import Frame

    frame = Frame.of(tokenizer, tasks)
    rows = ["| direction | before the source | target prefix |", "|---|---|---|"]
    for task in tasks:
        before, prefix = ([tokenizer.convert_ids_to_tokens(row) for row in side] for side in frame.before(task))
        rows.append(f"| {task} | {_code(before)} | {_code(prefix)} |")
    return "The model translates all of these directions:\n\n" + "\n".join(rows)


def _code(tokens: list[str]) -> str:
    return " ".join(f"`{token}`" for token in tokens) or "none"


def _framed(task: str, model: Any, tokenizer: Any, folder: Path) -> usage.Framed | None:
    """What stands around a line; None where the task is no direction that the tokenizer has tags for.

    Nor of an mBART (not mBART-50) whose decoder starts from the tag of a language, which its sources have at their end.
    """
    from nspec.mt.language_tags import languages_of
    from nspec.mt.text.frame import Frame
    from nspec.mt.text.marian import is_marian

    if tokenizer is None or not (is_marian(tokenizer) or languages_of(tokenizer)):
        return None
    try:
        frame = Frame.of(tokenizer, [task])
    except ValueError:
        return None
    if model.config.decoder_start_token_id not in (None, frame.start_id):
        return None
    before, prefix = ([tokenizer.convert_ids_to_tokens(row) for row in side] for side in frame.before(task))
    language = ""
    if not frame.marian:
        codes = {token: code for code, token in getattr(tokenizer, "lang_code_to_token", {}).items()}
        language = codes.get(before[0], before[0])
    pieces = ("source.spm", "target.spm") if frame.marian else _sentencepiece(folder)
    most = int(model.config.max_position_embeddings)
    return usage.Framed(before, tokenizer.eos_token, prefix, language, pieces, most)


def _sentencepiece(folder: Path) -> tuple[str, str] | None:
    for name in ("spm.model", "sentencepiece.bpe.model"):
        if (folder / name).is_file():
            return name, name
    return None


def check_absent(folder: Path) -> None:
    """Raises ValueError where something is at ``folder``, before the work."""
    if folder.exists() or folder.is_symlink():
        raise ValueError(f"{folder} is there already; remove it, or name another folder")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty folder that becomes ``folder`` when the body has ended without an error.

    Raises:
        ValueError: there is one already.
        OSError: what the operating system said; nothing is left.
    """
    check_absent(folder)
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        yield part
        readable = part.stat().st_mode & 0o666  # safetensors lets the owner alone read; a server may be another user
        for path in part.rglob("*"):
            if path.is_file():
                path.chmod(readable)
        os.rename(part, folder)
    except (OSError, SafetensorError) as error:  # what the library makes of a full disk
        raise disk_error(error, folder) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
