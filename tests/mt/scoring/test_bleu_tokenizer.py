from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("sacrebleu")

from nspec import cli
from nspec.mt.scoring import bleu_tokenizer as tokenizers
from nspec.mt.scoring.bleu_tokenizer import SPBLEU, bleu_tokenizer, check_tokenizer, of_language, why_not
from nspec.mt.scoring.config import ScoreConfig

PROPER = {
    "zh": "zh zh_CN zh-TW zh_Hans ZH_hant zh_hant_HK zho_Hans zho_Hant chi zht cmn_Hans cmn_Hant yue yue_Hant wuu lzh gan "
    "hak nan nan_Hant zh_classical zh_min_nan vi_Hani cn",
    "13a": "de pt_BR sr_Latn sr_Cyrl en_XX zho_Latn zh_Latn_pinyin nan_Latn cdo_Latn dng_Cyrl ja_Latn kor_Latn th_Latn "
    "jav_Latn vi bo_Latn ko@latin x su_Sund",  # today's Sundanese script has spaces, unlike that of Java and Bali
    "ja-mecab": "ja jpn ja_JP ja_XX jpn_Jpan ja-Jpan ja_Hani JA jp",
    "ko-mecab": "ko kor ko_KR kor_Hang ko_Kore",
    "char": "th tha_Thai th_TH lo lao_Laoo km khm_Khmr km_KH my mya_Mymr my_MM bo bod_Tibt dzo_Tibt shn_Mymr pi_Thai "
    "jav_Java ryu",
}


@pytest.mark.parametrize(
    ("code", "tokenizer"), [(code, name) for name, codes in PROPER.items() for code in codes.split()]
)
def test_tokenizer_follows_language_and_script(code: str, tokenizer: str) -> None:
    assert of_language(code) == tokenizer
    if tokenizer.endswith("mecab"):  # installed or not, the number says which
        assert bleu_tokenizer(code) in {(tokenizer, ""), ("char", f"{tokenizer}-not-installed")}
    else:
        assert bleu_tokenizer(code) == (tokenizer, "")
    assert bleu_tokenizer(code, "intl") == ("intl", "")


def test_no_language_whose_script_has_no_spaces_is_split_at_spaces() -> None:
    """By CLDR; languages that have no code of two letters are held to it where FLORES+ or Tatoeba have them."""
    likely = pytest.importorskip("babel.core").get_global("likely_subtags")
    scripts = {code: value.split("_")[1] for code, value in likely.items() if value.count("_") == 2}
    wanted = ["Hans", "Hant", "Jpan", "Kore", "Thai", "Laoo", "Khmr", "Mymr", "Tibt", "Lana", "Tale", "Talu"]
    more = (
        "yue",
        "wuu",
        "nan",
        "hak",
        "gan",
        "lzh",
        "cjy",
        "hsn",
        "cdo",
        "shn",
        "mnw",
        "nod",
        "khb",
        "tdd",
        "ksw",
        "ryu",
    )
    codes = [code for code, script in scripts.items() if script in wanted and (len(code) == 2 or code in more)]
    assert len(codes) > 20
    assert [code for code in codes if of_language(code) == "13a"] == []


def test_every_tokenizer_of_sacrebleu_can_be_chosen() -> None:
    from sacrebleu.metrics import BLEU

    choices = ScoreConfig.__dataclass_fields__["tokenize"].metadata["choices"]
    assert set(BLEU.TOKENIZERS) <= set(choices)
    assert [name for name in ("auto", "13a", "zh", "intl", "char", "none") if check_tokenizer(name)] == []
    assert why_not("13b").startswith("sacreBLEU ")


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for sacreBLEU's models, and a network that fails after it has given half of a file."""

    def download(url: str, path: str) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(b"half of it")
        raise OSError("no network")

    monkeypatch.setattr("sacrebleu.utils.SACREBLEU_DIR", str(tmp_path))
    monkeypatch.setattr("sacrebleu.tokenizers.tokenizer_spm.SACREBLEU_DIR", str(tmp_path))
    monkeypatch.setattr("sacrebleu.tokenizers.tokenizer_spm.download_file", download)
    tokenizers._trouble.cache_clear()
    yield tmp_path / "models"
    tokenizers._trouble.cache_clear()


@pytest.mark.parametrize("name", SPBLEU)
def test_a_model_that_cannot_be_fetched_is_one_error_that_says_where_it_goes(models: Path, name: str) -> None:
    with pytest.raises(
        ValueError, match=rf"tokenizer {name}: .*fetched \(no network\).* download https://.* put it at "
    ) as caught:
        check_tokenizer(name)
    assert f"{models}/" in str(caught.value)
    assert [path.name for path in models.iterdir()] == [], "half a file would be taken for the whole"


def test_a_file_that_is_no_model_is_named_and_kept(models: Path) -> None:
    models.mkdir()
    path = models / "flores200sacrebleuspm"
    path.write_text("<html>log in first</html>")
    with pytest.raises(ValueError, match=rf"{path} is not its SentencePiece model .*; replace it by https"):
        check_tokenizer("flores200")
    assert path.exists()


def test_spbleu_is_sacrebleus_own(models: Path) -> None:
    """With a small model in the place of the large one."""
    import sentencepiece
    from sacrebleu.metrics import BLEU

    from nspec.mt.scoring.scores import score_system

    models.mkdir()
    with open(models / "flores200sacrebleuspm", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["abc abd bcd acd"] * 20), model_writer=file, vocab_size=12, minloglevel=2
        )
    lines, other = {"en-th": ["abc abd", "bcd acd abc"]}, {"en-th": ["abc abd", "bcd abd abc"]}
    entry = score_system(lines, other, ScoreConfig(tokenize="flores200", bootstrap=40), "en")["tasks"]["en-th"]
    assert entry["bleu"] == BLEU(tokenize="flores200").corpus_score(lines["en-th"], [other["en-th"]]).score
    assert "tok:flores200" in entry["bleu_signature"]


def test_a_run_with_a_tokenizer_that_cannot_be_used_ends_before_the_text_is_read(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--set", "score.tokenize=flores200", "--set", f"run.folder={tmp_path / 'run'}"]
    assert cli.main(["run", "cldr8", *options]) == 2
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 1
    assert shown[0].startswith("nspec: error: BLEU tokenizer flores200: its SentencePiece model cannot be fetched")
    assert not (tmp_path / "run" / "prepared").exists()


def test_a_dictionary_that_sacrebleu_refuses_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(tokenize: str) -> None:
        raise AssertionError("Please make sure to use the IPA dictionary for MeCab")

    monkeypatch.setattr("sacrebleu.metrics.BLEU.__init__", lambda self, tokenize: refuse(tokenize))
    tokenizers._trouble.cache_clear()
    try:
        assert bleu_tokenizer("ja") == ("char", "ja-mecab-not-usable")
        with pytest.raises(ValueError, match="tokenizer ja-mecab: sacreBLEU refuses MeCab's dictionary"):
            check_tokenizer("ja-mecab")
    finally:
        tokenizers._trouble.cache_clear()
