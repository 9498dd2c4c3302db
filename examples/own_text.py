"""Your own text: from files of sentences to scores and a report, by the command line or from Python.

    python examples/own_text.py [FOLDER]

Writes a little parallel text as Moses files (train.en-de.en, train.en-de.de, ...), configures a tiny run over it, and looks
at what the run leaves behind. A minute on a CPU; needs nspec with its extra "mt".
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path

import nspec
import nspec.cli

WORDS = {
    "en": "the a red green big small dog cat house tree sees likes has two three old",
    "de": "der ein rot grün groß klein Hund Katze Haus Baum sieht mag hat zwei drei alt",
    "fr": "le un rouge vert grand petit chien chat maison arbre voit aime a deux trois vieux",
}
SETTINGS = """
run: {systems: [dense, continued, forward], threads: 1}
corpus: {type: files, max_tokens: 32}
tokenizer: {vocab_size: 90}
model: {d_model: 32, d_ff: 64, heads: 2, encoder_layers: 1, decoder_layers: 1, max_positions: 64}
train: {updates: 120, batch_tokens: 512, warmup: 20, lr: 5e-3, valid_every: 60, valid_bleu_sentences: 4}
specialize: {updates: 10, batch_tokens: 512, warmup: 5, lr: 2e-3, valid_every: 5, valid_bleu_sentences: 4}
decode: {beam: 1}
score: {bootstrap: 100}
"""


def write_text(folder: Path, sentences: int) -> None:
    """Word by word "translations" of random sentences: one file for each language, split and pair."""
    draw = random.Random(1)
    for split, lines in (("train", sentences), ("valid", 20), ("test", 20)):
        for language in ("de", "fr"):
            rows = [[draw.randrange(16) for _ in range(draw.randrange(3, 8))] for _ in range(lines)]
            for code in ("en", language):
                text = "".join(" ".join(WORDS[code].split()[word] for word in row) + "\n" for row in rows)
                (folder / f"{split}.en-{language}.{code}").write_text(text, encoding="utf-8")


def main(folder: str = "", sentences: int = 400) -> None:
    """Writes text and run into ``folder``."""
    base = Path(folder or tempfile.mkdtemp())
    text = base / "text"
    text.mkdir(parents=True, exist_ok=True)
    write_text(text, sentences)
    (base / "my.yaml").write_text(SETTINGS, encoding="utf-8")

    # In a shell: nspec run my.yaml --set corpus.path=... ; what it prints and writes is the same.
    options = [f"corpus.path={text}", f"run.folder={base / 'run'}"]
    if status := nspec.cli.main(["run", str(base / "my.yaml"), "--set", options[0], "--set", options[1]]):
        sys.exit(status)

    masks = nspec.NeuronMasks.load(base / "run" / "masks")
    print(masks)
    for task, layers in masks.density().items():
        print(f"{task}: {', '.join(f'{layer} {share:.2f}' for layer, share in layers.items())} of the neurons kept")


if __name__ == "__main__":
    main(*sys.argv[1:])
