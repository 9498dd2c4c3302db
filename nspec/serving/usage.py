"""The lines of Python in an exported folder's README that translate, or go on with a text, by what is in the folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

_CLEAN = 'lines = [" ".join(unicodedata.normalize("NFC", line).split()) for line in lines]'
_LINES = 'lines = ["A sentence.", "Another one."]'


@dataclass(frozen=True)
class Framed:
    """What stands around a line of text, as tokens.

    Attributes:
        before: the source: the tag of its language, or none.
        end: behind the source.
        prefix: what a translation begins with: the tag of its language, or none.
        source_language: what ``tokenizer.src_lang`` is set to, where it has that.
        pieces: the SentencePiece models of source and target in the folder; empty: it has a tokenizer.json.
        most: the longest source and translation in tokens, with what stands around them.
    """

    before: Sequence[str]
    end: str
    prefix: Sequence[str]
    source_language: str
    pieces: tuple[str, str] | None
    most: int


def of_ctranslate2(framed: Framed, beam: int, length_penalty: float) -> str:
    """The lines for a folder of CTranslate2: no transformers and no torch."""
    room = framed.most - len(framed.before) - 1
    first = "".join(f"{_text(token)}, " for token in framed.before)
    prefix = f"[[{_text(framed.prefix[0])}]] * len(lines)" if framed.prefix else "None"
    search = (
        f"beam_size={beam}, length_penalty={length_penalty:g}, max_input_length=0, max_decoding_length={framed.most}"
    )
    if framed.pieces:
        source, target = framed.pieces
        imports = "import ctranslate2\nimport sentencepiece"
        same = source == target
        setup = [f'pieces = sentencepiece.SentencePieceProcessor(model_file=f"{{folder}}/{source}")']
        if not same:
            setup.append(f'target = sentencepiece.SentencePieceProcessor(model_file=f"{{folder}}/{target}")')
        tokens = f"pieces.encode(line, out_type=str)[:{room}]"
        name = "pieces" if same else "target"
        words = f"[token for token in result.hypotheses[0] if {name}.piece_to_id(token) != {name}.unk_id()]"
    else:
        imports = "import ctranslate2\nimport tokenizers"
        setup = [
            'pieces = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")',
            "pieces.encode_special_tokens = True",
        ]
        tokens = f"pieces.encode(line, add_special_tokens=False).tokens[:{room}]"
        name, words = "pieces", "[pieces.token_to_id(token) for token in result.hypotheses[0]]"
    return "\n".join(
        [
            f"import unicodedata\n\n{imports}\n",
            'folder = "."',
            "translator = ctranslate2.Translator(folder)",
            *setup,
            "",
            _LINES,
            _CLEAN,
            f"sources = [[{first}*{tokens}, {_text(framed.end)}] for line in lines]",
            f"search = dict({search})",
            f"for line, result in zip(lines, translator.translate_batch(sources, {prefix}, **search)):",
            f"    words = {words}",
            f"    print({name}.decode(words) if line else '')",
        ]
    )


def _text(token: str) -> str:
    return json.dumps(token, ensure_ascii=False)


def of_transformers(framed: Framed, beam: int, length_penalty: float) -> str:
    """The lines for a folder of transformers."""
    tag = f"forced_bos_token_id=tokenizer.convert_tokens_to_ids({_text(framed.prefix[0])}), " if framed.prefix else ""
    text = "lines" if framed.prefix or not framed.before else f'[f"{framed.before[0]} {{line}}" for line in lines]'
    search = f"num_beams={beam}, length_penalty={length_penalty:g}, early_stopping={beam > 1}"
    search += f", max_length={framed.most + 1}"  # with what starts the decoder
    language = [f"tokenizer.src_lang = {_text(framed.source_language)}"] if framed.source_language else []
    return "\n".join(
        [
            "import unicodedata\n\nfrom transformers import AutoModelForSeq2SeqLM, AutoTokenizer\n",
            'folder = "."',
            "model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)",
            *language,
            "",
            _LINES,
            _CLEAN,
            f'batch = tokenizer({text}, return_tensors="pt", padding=True, truncation=True, max_length={framed.most})',
            f"ids = model.generate(**batch, {tag}{search})",
            "for line, text in zip(lines, tokenizer.batch_decode(ids, skip_special_tokens=True)):",
            "    print(text.strip() if line else '')",
        ]
    )


def of_other(kind: str, format: str) -> str:
    """The lines for models that nspec does not translate with.

    Args:
        kind: ``Seq2SeqLM`` or ``CausalLM``.
        format: ``transformers`` or ``ctranslate2``.
    """
    if format == "transformers":
        return "\n".join(
            [
                f"from transformers import AutoModelFor{kind}, AutoTokenizer\n",
                'folder = "."',
                f"model, tokenizer = AutoModelFor{kind}.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)",
                'batch = tokenizer("A text", return_tensors="pt")',
                "print(tokenizer.batch_decode(model.generate(**batch, max_new_tokens=50), skip_special_tokens=True))",
            ]
        )
    causal = kind == "CausalLM"
    call = "Generator(folder).generate_batch" if causal else "Translator(folder).translate_batch"
    found = "sequences_ids[0]" if causal else "hypotheses[0]"
    limit = "max_length=50" if causal else "max_decoding_length=50"
    ids = f"result.{found}" if causal else f"[pieces.token_to_id(token) for token in result.{found}]"
    return "\n".join(
        [
            "import ctranslate2\nimport tokenizers\n",
            'folder = "."',
            'pieces = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")',
            'tokens = pieces.encode("A text").tokens',
            f"[result] = ctranslate2.{call}([tokens], {limit})",
            f"print(pieces.decode({ids}))",
        ]
    )
