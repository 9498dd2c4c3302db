"""Installed gettext catalogues: what is kept, how splits are kept apart, which locale is which language."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path

import pytest

from nspec.mt.text.config import CorpusConfig
from nspec.mt.text.corpus import CorpusError, open_corpus, tasks_of
from nspec.mt.text.corpus.catalogues import (
    MIN_SEGMENTS,
    SYSTEM_FOLDER,
    CatalogueCorpus,
    language_of,
    problem,
    split_domains,
)

messages_of_babel = pytest.importorskip("babel.messages", reason="Babel is not installed")
mofile = pytest.importorskip("babel.messages.mofile", reason="Babel is not installed")

WORDS = ["file", "folder", "user", "disk", "printer", "window", "message", "key", "server", "package", "line", "colour"]


def write(folder: Path, locale: str, domain: str, messages: dict[str, str | tuple[str, ...]]) -> None:
    """Writes a catalogue; a tuple is a message with plural forms (the id's plural is "<id> (many)")."""
    catalogue = messages_of_babel.Catalog(locale=locale, charset="utf-8")
    for english, translation in messages.items():
        identifier = (english, f"{english} (many)") if isinstance(translation, tuple) else english
        catalogue.add(identifier, translation)
    buffer = io.BytesIO()
    mofile.write_mo(buffer, catalogue)
    path = folder / locale / "LC_MESSAGES" / f"{domain}.mo"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())


def numbered(domain: str, count: int, word: str) -> dict[str, str | tuple[str, ...]]:
    return {
        f"Cannot open the {WORDS[n % 12]} number {n} of {domain}": f"{word} {WORDS[n % 12]} Nummer {n} in {domain}"
        for n in range(count)
    }


GIT = numbered("git", 300, "Kein Zugriff auf")


@pytest.fixture
def folder(tmp_path):
    for locale, word in (("de", "Kein Zugriff auf"), ("fr", "Pas d’accès à")):
        for domain, count in (("apt", 40), ("bash", 12), ("git", 300), ("tar", 11), ("sed", 10)):
            write(tmp_path, locale, domain, numbered(domain, count, word))
    return tmp_path


def config(folder: Path, *languages: str) -> CorpusConfig:
    return CorpusConfig(type="gettext", path=str(folder), languages=list(languages))


def test_messages_are_aligned_with_english_and_with_each_other(folder):
    settings = config(folder, "de", "fr")
    corpus = open_corpus(settings, 1)
    assert corpus.languages == ["de", "fr", "en"]
    assert tasks_of(settings, corpus) == ["en-de", "de-en", "en-fr", "fr-en"]
    for german, english in corpus.read(("de", "en"), "train"):
        assert german.split()[-3:-2] == [english.split()[5]]
    for german, french in corpus.read(("de", "fr"), "train"):
        assert german.split()[-1] == french.split()[-1]


def test_no_domain_and_no_english_text_is_in_two_splits(folder):
    shared = "The same message in every program"
    for domain in ("apt", "bash", "git", "tar", "sed"):
        messages = {**numbered(domain, 20, "Kein Zugriff auf"), shared: f"Dieselbe Meldung in {domain}"}
        write(folder, "de", domain, messages)
    corpus = open_corpus(config(folder, "de"), 1)
    parts = {
        split: [english for _, english in corpus.read(("de", "en"), split)] for split in ("train", "valid", "test")
    }
    domains = {split: {text.split()[-1] for text in texts if text != shared} for split, texts in parts.items()}
    assert sum(map(len, domains.values())) == len(set().union(*domains.values())) == 5
    assert all(domains.values())
    assert sum(texts.count(shared) for texts in parts.values()) == 1
    assert parts["test"].count(shared) == 1


def test_the_largest_domain_stays_in_training(folder):
    assert CatalogueCorpus(config(folder, "de"), 1).domains["git"] == "train"


@pytest.mark.parametrize(
    ("english", "translation", "reason"),
    [
        ("Open", "Öffnen", "fewer than two words"),
        ("<b>%s</b> %d", "<b>%s</b> %d", "not translated"),
        ("<b>%s</b> %d", "<i>%s</i>", "fewer than two words"),
        ("Open the file", "Open the file", "not translated"),
        ("Open the file", "", "empty side"),
        ("Open the file %s", "Die Datei öffnen", "placeholders differ"),
        ("Open the file %s", "Die Datei %d öffnen", "placeholders differ"),
        ("Open the {name} file", "Die Datei {nom} öffnen", "placeholders differ"),
        ("Open <b>the</b> file", "Die <i>Datei</i> öffnen", "placeholders differ"),
        ("Open the file", "123", "translation without words"),
        ("Open the file" + " again" * 60, "Die Datei öffnen", "too long"),
        ("Open the file", "ö" * 401, "too long"),
        ("Copy %s to %d", "Nach %2$d %1$s kopieren", ""),
        ("Used 50% of the disk", "50% der Platte belegt", ""),
        ("Open the ${file} for @USER@", "Für @USER@ die ${file} öffnen", ""),
    ],
)
def test_useless_messages_are_recognised(english, translation, reason):
    assert problem(english, translation) == reason


def test_left_out_messages_are_counted_and_texts_are_on_one_line(folder):
    write(
        folder,
        "de",
        "git",
        {**GIT, "Usage: git\n\n  add a  file": "Aufruf: git\n\teine Datei", "Open": "Öffnen", "A %s b": "x"},
    )
    corpus = open_corpus(config(folder, "de"), 1)
    assert ("Aufruf: git eine Datei", "Usage: git add a file") in list(corpus.read(("de", "en"), "train"))
    assert corpus.skipped == {"fewer than two words": 2}


def test_the_singular_of_a_plural_message_and_messages_with_context_are_used(folder):
    messages = {"%d file was removed": ("%d Datei wurde entfernt", "%d Dateien wurden entfernt")}
    write(folder, "de", "git", {**GIT, **messages, "menu\x04Open the window": "Das Fenster öffnen"})
    train = list(open_corpus(config(folder, "de"), 1).read(("de", "en"), "train"))
    assert ("%d Datei wurde entfernt", "%d file was removed") in train
    assert ("Das Fenster öffnen", "Open the window") in train


@pytest.mark.parametrize(
    ("locale", "code"),
    [
        ("de", "de"),
        ("de_DE", "de"),
        ("de_DE.UTF-8", "de"),
        ("de_AT", "de_AT"),
        ("sv_SE", "sv"),
        ("pt_BR", "pt_BR"),
        ("pt_PT", "pt"),
        ("zh_TW", "zh_TW"),
        ("sr@latin", "sr_Latn"),
        ("ca@valencia", "ca_valencia"),
        ("en_GB", ""),
        ("en@quot", ""),
        ("C", ""),
        ("l10n", ""),
    ],
)
def test_locales_are_languages_or_varieties(locale, code):
    assert language_of(locale) == code


def test_languages_with_too_few_messages_are_not_taken_by_themselves(folder):
    for locale in ("it", "nl"):
        number = MIN_SEGMENTS["train"] if locale == "it" else 100
        write(folder, locale, "git", numbered("git", number, "Nessun accesso a"))
        for domain in ("apt", "bash", "tar", "sed"):
            write(folder, locale, domain, numbered(domain, 40, "Nessun accesso a"))
    assert open_corpus(config(folder), 1).languages == ["en", "it"]


def test_an_unreadable_catalogue_does_not_spoil_the_others(folder):
    (folder / "de" / "LC_MESSAGES" / "broken.mo").write_bytes(b"not a catalogue")
    corpus = open_corpus(config(folder, "de"), 1)
    assert corpus.skipped == {"unreadable catalogue": 1}


def test_no_catalogues_and_a_missing_language_are_errors(tmp_path, folder):
    with pytest.raises(CorpusError, match="has no it; it has de, en, fr"):
        open_corpus(config(folder, "it"), 1)
    with pytest.raises(CorpusError, match="there are no catalogues <locale>/LC_MESSAGES"):
        open_corpus(config(tmp_path / "nowhere", "de"), 1)
    with pytest.raises(CorpusError, match=r"no language has enough messages .* set corpus.languages"):
        open_corpus(config(folder), 1)


def test_too_few_catalogues_to_keep_the_splits_apart_is_an_error(tmp_path):
    write(tmp_path, "de", "git", numbered("git", 50, "Kein Zugriff auf"))
    with pytest.raises(CorpusError, match="no validation data for de-en: .* has too few catalogues"):
        open_corpus(config(tmp_path, "de"), 1)


def test_held_out_domains_serve_every_language_at_the_least_cost():
    sizes = {
        "big": Counter(de=900, fr=900),
        "german": Counter(de=60),
        "both": Counter(de=50, fr=50),
        "other": Counter(de=50, fr=50),
    }
    assert split_domains(sizes, {"test": 50, "valid": 50}) == {
        "big": "train",
        "german": "train",
        "both": "test",
        "other": "valid",
    }


def test_the_fingerprint_follows_the_catalogues(folder):
    first = open_corpus(config(folder, "de"), 1).fingerprint()
    assert open_corpus(config(folder, "de"), 1).fingerprint() == first
    write(folder, "de", "sed", numbered("sed", 9, "Kein Zugriff auf"))
    assert open_corpus(config(folder, "de"), 1).fingerprint() != first


@pytest.mark.skipif(
    not (SYSTEM_FOLDER / "de" / "LC_MESSAGES").is_dir(), reason=f"no German catalogues in {SYSTEM_FOLDER}"
)
def test_the_catalogues_of_this_computer_give_german():
    corpus = open_corpus(CorpusConfig(type="gettext", languages=["de"]), 1)
    train = {english for _, english in corpus.read(("de", "en"), "train")}
    test = {english for _, english in corpus.read(("de", "en"), "test")}
    assert len(train) > len(test) > 0
    assert not train & test
