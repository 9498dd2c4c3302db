"""How BLEU splits text into words: the tokenizer of a target language, and whether the one asked for can be used here.

Importing this module loads neither sacreBLEU nor torch.
"""

from __future__ import annotations

import contextlib
import functools
import re
import socket
from collections.abc import Iterator
from pathlib import Path

AUTO = "auto"
SPBLEU = ("flores101", "flores200", "spBLEU-1K", "spm")
"""Tokenizers with a SentencePiece model, which is a file: BLEU by them is called spBLEU."""

# Codes of ISO 639, of older data sets (zht, zhs), and cn and jp, which are countries and no language's code.
_SINITIC = """
    zh zho chi zht zhs zhx cn cdo cjy cmn cnp cpx csp czh czo gan hak hnm hsn ltc luh lzh mnp nan och wuu yue
"""
_CHINESE, _JAPANESE, _KOREAN = frozenset(_SINITIC.split()), frozenset(["ja", "jpn", "jp"]), frozenset(["ko", "kor"])
# Languages whose usual script, by CLDR, has no spaces between words; where a code names a script, that counts.
_SPACELESS = """
    th tha sou nod tts lo lao kjg km khm my mya bur shn mnw rki blk ksw kht aio phk kjp pwo bo bod tib dz dzo lbj adx khg
    tdd khb kkh cuu blt ryu ams ojp ii iii
"""
_WITHOUT_SPACES = frozenset(_SPACELESS.split())
_HAN = frozenset(["Hans", "Hant", "Hani", "Hanb"])
_JAPANESE_SCRIPTS = frozenset(["Jpan", "Hira", "Kana", "Hrkt"])
_SPACELESS_SCRIPTS = frozenset(
    [*("Thai", "Laoo", "Khmr", "Mymr", "Tibt", "Lana", "Tale", "Talu", "Tavt", "Ahom", "Java", "Bali", "Bopo", "Yiii")]
)
# In which the languages above are written too, with spaces: pinyin, romaji, Pe̍h-ōe-jī, Dungan.
_SPACED_SCRIPTS = frozenset(["Latn", "Latf", "Cyrl", "Arab", "Deva", "Beng", "Grek", "Hebr"])
_FETCH_SECONDS = 30  # without an answer of the server


def bleu_tokenizer(target: str, tokenize: str = AUTO) -> tuple[str, str]:
    """The sacreBLEU tokenizer of a target language, and a note where the proper one cannot be used.

    Args:
        target: a language code such as ``de``, ``zh_CN``, ``zh-Hant`` or ``jpn_Jpan``.
        tokenize: the tokenizer that was asked for; ``auto``: that of the language.

    Returns:
        What was asked for, with an empty note. By ``auto`` ``zh`` for Chinese languages and whatever is written in Han
        characters, ``ja-mecab`` and ``ko-mecab`` for Japanese and Korean, ``char`` for scripts without spaces between words
        (Thai, Lao, Khmer, Burmese, Tibetan), ``13a`` for all others, so also for Chinese in Latin script (``zh_Latn``).
        Where MeCab is not installed it is ``char``, with a note for the signature.
    """
    if tokenize != AUTO:
        return tokenize, ""
    name = of_language(target)
    reason = why_not(name) if name.endswith("mecab") else ""
    if not reason:
        return name, ""
    return "char", f"{name}-not-{'installed' if 'not installed' in reason else 'usable'}"


def of_language(target: str) -> str:
    """The proper tokenizer of a language, whether it can be used here or not."""
    language, *rest = re.split(r"[-_@.]", target.strip())
    language = language.lower()
    script = next((part.title() for part in rest if len(part) == 4 and part.isalpha()), "")
    if script in _SPACED_SCRIPTS or "latin" in map(str.lower, rest):
        return "13a"
    if language in _JAPANESE:
        return "ja-mecab"
    if language in _KOREAN:
        return "ko-mecab"
    if script in _HAN:
        return "zh"
    if script in _SPACELESS_SCRIPTS | _JAPANESE_SCRIPTS:
        return "char"
    return "zh" if language in _CHINESE else "char" if language in _WITHOUT_SPACES else "13a"


def check_tokenizer(tokenize: str) -> None:
    """Sees to it that a tokenizer can be used; ``auto`` always can. The model of spBLEU is fetched where it is missing.

    Raises:
        ValueError: it cannot; the message says what to install, or which file to put where.
    """
    if tokenize != AUTO and (reason := why_not(tokenize)):
        raise ValueError(f"BLEU tokenizer {tokenize}: {reason}")


def why_not(tokenizer: str) -> str:
    """Why a tokenizer of sacreBLEU cannot be used here and what to do about it; empty where it can."""
    from sacrebleu import __version__
    from sacrebleu.metrics import BLEU

    if tokenizer not in BLEU.TOKENIZERS:
        return (
            f"sacreBLEU {__version__} has {', '.join(BLEU.TOKENIZERS)}; choose one of these, or install a newer version"
        )
    return _trouble(tokenizer)


@functools.cache  # MeCab reads its dictionary each time
def _trouble(tokenizer: str) -> str:
    from sacrebleu.metrics import BLEU

    if tokenizer in SPBLEU:
        return _model_trouble(tokenizer)
    try:
        BLEU(tokenize=tokenizer)
    except (RuntimeError, ImportError):  # how sacreBLEU says that MeCab or its dictionary is missing
        return f"it needs packages that are not installed: pip install 'sacrebleu[{tokenizer[:2]}]'"
    except AssertionError as error:
        return f"sacreBLEU refuses MeCab's dictionary ({error}): pip install 'sacrebleu[{tokenizer[:2]}]'"
    return ""


def _model_trouble(tokenizer: str) -> str:
    """Loads the SentencePiece model, which sacreBLEU fetches where it is missing."""
    from sacrebleu.metrics import BLEU
    from sacrebleu.tokenizers.tokenizer_spm import SPM_MODELS
    from sacrebleu.utils import SACREBLEU_DIR

    url = SPM_MODELS[tokenizer]["url"]
    path = Path(SACREBLEU_DIR) / "models" / url.rpartition("/")[2]
    there = path.exists()
    try:
        with _patience(_FETCH_SECONDS):
            BLEU(tokenize=tokenizer)
    except (Exception, SystemExit) as error:  # of sacreBLEU's lock, of the network, of SentencePiece
        what = " ".join(str(error).split()) or type(error).__name__
        if there:
            return f"{path} is not its SentencePiece model ({what}); replace it by {url}"
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)  # a part of it would be taken for the whole
        return (
            f"its SentencePiece model cannot be fetched ({what}); where there is a network, download {url} and put it at "
            f"{path} (the environment variable SACREBLEU names another folder than {SACREBLEU_DIR})"
        )
    return ""


@contextlib.contextmanager
def _patience(seconds: float) -> Iterator[None]:
    """New connections give up after so long; sacreBLEU would wait for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
