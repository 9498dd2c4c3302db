"""The options of model, profile, masks and adapters."""

from __future__ import annotations

from dataclasses import dataclass

from nspec.options import option


@dataclass
class ModelConfig:
    pretrained: str = option(
        "",
        "folder or hub name of a model (M2M100, NLLB, mBART-50, Marian) to start from; with train.updates 0 it is the "
        "dense model as it is; empty: a new one",
        path=True,
    )
    d_model: int = option(512, "model width", least=4, most=65536)
    d_ff: int = option(2048, "feed-forward neurons of a layer", least=1, most=2**20)
    heads: int = option(8, "attention heads", least=1, most=65536)
    encoder_layers: int = option(6, "encoder layers", least=1, most=1000)
    decoder_layers: int = option(6, "decoder layers", least=1, most=1000)
    dropout: float = option(0.1, "dropout of embeddings and residual branches", least=0, below=1)
    attention_dropout: float = option(0.1, "dropout of attention weights", least=0, below=1)
    max_positions: int = option(256, "longest sequence in tokens", least=4, most=2**20)


@dataclass
class ProfileConfig:
    split: str = option("valid", "the text whose activations are counted", ("valid", "train"))
    sentences: int = option(0, "most sentences of a direction; 0: all", least=0)
    share: float = option(1.0, "share of a direction's sentences, evenly spread", above=0, most=1)
    path: str = option(
        "", "a folder with parallel text of another domain, counted instead; empty: the run's own text", path=True
    )
    path_split: str = option("valid", "with path: the name of the part that is counted")
    padding: str = option(
        "exclude", "include counts padded positions too, as the authors' release does", ("exclude", "include")
    )


PARTS = tuple(f"k_{way}_{side}" for way in ("from", "to") for side in ("encoder", "decoder"))
"""The options of the section ``select`` with a k for one part: of directions from or to the pivot, on one side."""


@dataclass
class SelectConfig:
    rule: str = option(
        "share",
        "share: a direction keeps the most active neurons of each layer, which hold a share k of its activations; lape: "
        "those of the whole model that tell directions apart, each for the directions that it fires often for; top: the "
        "most active share of each layer; specific: that with the highest ratio to the other directions' frequency; "
        "random: a share of each layer drawn at random, the control of the others; loss: as share, with the smallest k of "
        "the grid, for each direction and part of the model, whose masks alone, without training, raise its validation "
        "loss by no more than the tolerance (on as many sentences as profile.sentences says); conflict: the share of the "
        "whole model's neurons whose parameters the direction would train most differently from what all do together "
        "(by gradients on the text of profile.split, likewise)",
        ("share", "lape", "top", "specific", "random", "loss", "conflict"),
    )
    like: str = option(
        "",
        "of the rule random: another rule, which then says how many neurons of each direction and layer are drawn; empty: "
        "a share",
        ("", "share", "lape", "top", "specific", "loss", "conflict"),
    )
    tolerance: float = option(
        0.01, "of the rule loss: by how much the loss may rise, in nats per target token", least=0, most=100
    )
    grid: list[float] = option(
        [0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99], "of the rule loss: the ks that are tried", above=0, below=1
    )
    by: str = option(
        "half",
        "of the rule loss: whether a k is of a side, encoder or decoder (half), or of a layer",
        ("half", "layer"),
    )
    k: float = option(
        0.95, "of the rule share: share of a layer's activations that the kept neurons cover", above=0, most=1
    )
    k_from_encoder: float = option(
        0.0,
        "of the rule share: k of directions from the pivot in the encoder; 0: as k; 1: these are not specialised there, "
        "but use and train all of its neurons",
        least=0,
        most=1,
    )
    k_from_decoder: float = option(0.0, "the same in the decoder", least=0, most=1)
    k_to_encoder: float = option(0.0, "the same of directions to the pivot in the encoder", least=0, most=1)
    k_to_decoder: float = option(0.0, "and in the decoder", least=0, most=1)
    rate: float = option(
        0.01, "of the rule lape: share of all neurons that is kept for one direction or several", above=0, most=1
    )
    share: float = option(
        0.01,
        "of the rules top, specific and random: share of a layer's neurons, at least one of them; of conflict: of all",
        above=0,
        most=1,
    )
    layers: list[str] = option(
        [],
        "the feed-forward layers that are specialised, the others stay dense; empty: all. Shell patterns for the name "
        "(model.encoder.layers.0.fc1) or a part of it between dots, such as encoder or decoder.layers.1",
    )

    directions: str = option(
        "all",
        "of the system neurons+shared: the directions that get neurons of their own: all, or those from or to the pivot; "
        "the others have the shared weights alone",
        ("all", "from", "to"),
    )

    @property
    def sized_by(self) -> str:
        """The rule that says how many neurons are kept."""
        return self.like if self.rule == "random" and self.like else self.rule

    @property
    def parts(self) -> dict[str, float]:
        """The ks of single parts of the model that are given, by option."""
        return {name: value for name in PARTS if (value := getattr(self, name))}

    def k_of(self, way: str, side: str) -> float:
        """The k of directions ``from`` or ``to`` the pivot in ``encoder`` or ``decoder``."""
        k: float = getattr(self, f"k_{way}_{side}") or self.k
        return k


@dataclass
class HeadsConfig:
    share: float = option(
        0.75, "share of the heads of each attention that a direction keeps, at least one of them", above=0, most=1
    )
    sentences: int = option(
        100, "validation sentences of each direction that importance is measured on, at most; 0: all", least=0
    )
    layers: list[str] = option(
        [],
        "the attention that is specialised; empty: all. Shell patterns as in select.layers: decoder, encoder_attn, ...",
    )


@dataclass
class LassConfig:
    alpha: float = option(
        0.3,
        "share of the weights of smallest magnitude that is pruned from each matrix of attention, fc1 and fc2",
        least=0,
        below=1,
    )


@dataclass
class AdaptersConfig:
    bottleneck: int = option(64, "width of an adapter, after each layer of encoder and decoder", least=1, most=65536)
    lr: float = option(
        1e-3,
        "highest learning rate of adapters; the model itself is frozen, or has specialize.lr (adapters+shared)",
        above=0,
        most=1000,
    )
    families: str = option(
        "branch",
        "of adapters_family: branch (Germanic, Romance, ...), family (Indo-European, ...) or ec30 (the five groups of that "
        "data set)",
        ("branch", "family", "ec30"),
    )
