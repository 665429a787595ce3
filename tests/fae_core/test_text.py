"""The frozen text encoder: four architectures, its tokens, its fingerprint, what it refuses."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import utils as hub
from safetensors.torch import load_file
from torch.nn import functional as F

from fae_core.text import (
    MINILM,
    CaptionTokenizer,
    TextEncoder,
    TextSpec,
    load_text_encoder,
    text_fingerprints,
    text_source,
    text_width,
    untrained_text_encoder,
)
from fae_core.weights import WeightsError
from tests.tiny import save_text_encoder

KINDS = {
    "bert": "BertModel",
    "t5": "T5EncoderModel",
    "clip": "CLIPTextModel",
    "qwen3": "Qwen3Model",
}
CAPTIONS = ["a red cat", "a small blue dog", "", "zebra"]


@pytest.fixture(scope="module", params=KINDS)
def spec(request, tmp_path_factory) -> TextSpec:
    folder = save_text_encoder(
        tmp_path_factory.mktemp(request.param) / request.param, request.param
    )
    return TextSpec(weights=str(folder), max_length=6)


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> TextSpec:
    folder = save_text_encoder(tmp_path_factory.mktemp("encoder"))
    return TextSpec(weights=str(folder), max_length=6)


def states(spec: TextSpec, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = CaptionTokenizer(spec)(captions)
    return load_text_encoder(spec)(ids, mask), mask


def test_the_text_tower_of_each_architecture_gives_states_and_zeros_beside_them(spec) -> None:
    encoder = load_text_encoder(spec)
    assert type(encoder.model).__name__ == KINDS[Path(spec.weights).name]
    result, mask = states(spec, CAPTIONS)
    assert result.shape == (4, 6, 16) and result.dtype == torch.float32
    assert encoder.dim == text_width(spec) == 16
    assert mask.sum(1).tolist() == [4, 5, 1, 2]
    assert result.isfinite().all()
    assert result[mask].abs().sum(-1).min() > 0 and not result[~mask].any()


def test_neither_length_nor_company_changes_a_captions_states(spec) -> None:
    together, _ = states(spec, CAPTIONS)
    alone, _ = states(spec, CAPTIONS[1:2])
    longer, _ = states(replace(spec, max_length=9), CAPTIONS)
    torch.testing.assert_close(alone[0], together[1], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(longer[:, :6], together, rtol=1e-3, atol=1e-5)
    assert not longer[:, 6:].any()


@pytest.mark.parametrize("enabled", [True, False])
def test_what_transformers_shows_stays_the_users(bert, enabled) -> None:
    logging, bars = transformers.logging, (hub.enable_progress_bars, hub.disable_progress_bars)
    before = logging.get_verbosity()
    logging.set_verbosity_info()
    (logging.enable_progress_bar if enabled else logging.disable_progress_bar)()
    bars[enabled]()  # the hub's are another matter
    try:
        CaptionTokenizer(bert)
        load_text_encoder(bert)
        assert logging.get_verbosity() == transformers.logging.INFO
        assert logging.is_progress_bar_enabled() == enabled
        assert hub.are_progress_bars_disabled() == enabled
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()


def test_an_encoder_of_shapes_alone_has_the_same_shapes(spec) -> None:
    with torch.device("meta"):
        untrained = untrained_text_encoder(spec)
    trained = load_text_encoder(spec)
    assert {n: p.shape for n, p in untrained.named_parameters()} == {
        n: p.shape for n, p in trained.named_parameters()
    }


def test_an_earlier_layer_gives_other_states(bert) -> None:
    ids, mask = CaptionTokenizer(bert)(CAPTIONS)
    encoder = load_text_encoder(replace(bert, layer=-2))
    hidden = encoder.model(ids, mask.long(), output_hidden_states=True).hidden_states
    assert torch.equal(encoder(ids, mask)[mask], hidden[-2][mask].half().float())
    assert not torch.allclose(encoder(ids, mask)[mask], hidden[-1][mask])


def test_states_are_numbers_that_float16_has_and_none_is_infinite(bert) -> None:
    encoder = load_text_encoder(bert)
    states = encoder(*CaptionTokenizer(bert)(CAPTIONS))
    assert torch.equal(states, states.half().float())
    with torch.no_grad():
        encoder.model.encoder.layer[-1].output.LayerNorm.weight.fill_(1e6)
    assert encoder(*CaptionTokenizer(bert)(CAPTIONS)).abs().max() == 65504


def test_captions_are_cut_padded_and_put_into_the_template(bert) -> None:
    tokenizer = CaptionTokenizer(replace(bert, max_length=4, template="a small {}"))
    ids, mask = tokenizer(["cat", "red dog house", "", None])
    assert ids.tolist() == [[3, 7, 9, 2], [3, 7, 4, 2], [2, 0, 0, 0], [2, 0, 0, 0]]
    assert mask.tolist() == [[True] * 4, [True] * 4, *[[True, False, False, False]] * 2]


def test_what_the_encoder_will_not_see_is_counted(bert) -> None:
    captions = ["a cat", None, "  ", "a red cat a red cat", "katze", "a katze a red cat a"]
    counts = CaptionTokenizer(bert).count(captions)
    assert (counts.total, counts.missing, counts.cut, counts.unknown) == (6, 2, 2, 2)
    assert CaptionTokenizer(bert).count([None]).missing == 1


def test_the_encoder_is_frozen_and_stays_in_eval_mode(bert) -> None:
    encoder = load_text_encoder(bert)
    encoder.train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not encoder(*CaptionTokenizer(bert)(CAPTIONS)).requires_grad


def test_the_fingerprint_says_weights_tokenizer_and_settings(bert, tmp_path) -> None:
    def marks(spec: TextSpec) -> dict[str, str]:
        return text_fingerprints(load_text_encoder(spec), CaptionTokenizer(spec))

    same = save_text_encoder(tmp_path / "same")
    other = save_text_encoder(tmp_path / "other", seed=1)
    plain = marks(bert)
    assert marks(replace(bert, weights=str(same), name="anything")) == plain
    changed = marks(replace(bert, weights=str(other)))
    assert [name for name in plain if changed[name] != plain[name]] == ["text encoder"]
    changed = marks(replace(bert, template="a {}"))
    assert [name for name in plain if changed[name] != plain[name]] == ["text settings"]
    vocabulary = same / "tokenizer.json"
    vocabulary.write_text(vocabulary.read_text().replace('"cat"', '"cow"'))
    changed = marks(replace(bert, weights=str(same)))
    assert [name for name in plain if changed[name] != plain[name]] == ["text tokenizer"]


def test_a_folder_with_pickled_weights_is_refused_and_not_opened(bert, tmp_path) -> None:
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "opened"), "w"))

    folder = save_text_encoder(tmp_path / "pickled")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(WeightsError, match=r"pytorch_model\.bin, a pickle.*save_pretrained"):
        load_text_encoder(replace(bert, weights=str(folder)))
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": "/nowhere"}, "no folder with a config.json, and none of hub"),
        ({"max_length": 33}, "max_length=33 is more than the 32 positions"),
        ({"layer": -3}, "layer=-3: .* has 2 layers"),
    ],
)
def test_what_does_not_fit_is_said(bert, changes, message) -> None:
    with pytest.raises(WeightsError, match=message):
        load_text_encoder(replace(bert, **changes))


def test_a_folder_that_lacks_weights_is_not_filled_with_random_ones(bert, tmp_path) -> None:
    from safetensors.torch import save_file

    folder = save_text_encoder(tmp_path / "part")
    tensors = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if "layer.1.output" not in name}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsError, match=r"has no weights for \d+ tensors of BertModel"):
        load_text_encoder(replace(bert, weights=str(folder)))


def test_minilms_states_equal_bert_written_out_on_its_own_weights() -> None:
    spec = TextSpec(weights=MINILM, max_length=16)
    ids, mask = CaptionTokenizer(spec)(["woman pilot: dark skin tone", "red apple"])
    encoder: TextEncoder = load_text_encoder(spec)
    assert sum(p.numel() for p in encoder.parameters()) == 22_713_216 - 384 * 385  # no pooler
    weights = load_file(Path(text_source(spec)) / "model.safetensors")
    expected = written_out(weights, ids, mask)
    torch.testing.assert_close(encoder(ids, mask)[mask], expected[mask], rtol=1e-3, atol=1e-4)


def written_out(w: dict[str, torch.Tensor], ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """BERT of arXiv 1810.04805 with 12 heads: token states [B, L, D] of ids [B, L]."""

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-12)

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(2, (12, -1)).transpose(1, 2)

    words, positions, types = (
        w[f"embeddings.{name}_embeddings.weight"] for name in ("word", "position", "token_type")
    )
    x = norm("embeddings.LayerNorm", words[ids] + positions[: ids.shape[1]] + types[0])
    for layer in range(6):
        at = f"encoder.layer.{layer}"
        q, k, v = (heads(linear(f"{at}.attention.self.{n}", x)) for n in ("query", "key", "value"))
        scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(~mask[:, None, None], float("-inf"))
        attended = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = norm(f"{at}.attention.output.LayerNorm",
                 x + linear(f"{at}.attention.output.dense", attended))  # fmt: skip
        hidden = F.gelu(linear(f"{at}.intermediate.dense", x))
        x = norm(f"{at}.output.LayerNorm", x + linear(f"{at}.output.dense", hidden))
    return x
