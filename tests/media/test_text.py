"""Text encoders: embeddings are those of the library's own encoder, and what cannot be loaded is a sentence."""

import json
import sys

import pytest
import torch
import transformers

from fvdm.media.text import clean, load_text_encoder
from tests.tiny_models import CORPUS, WIDTH, tiny_text_encoder, tiny_tokenizer


@pytest.fixture(scope="module", params=["umt5", "t5"])
def folder(request, tmp_path_factory):
    return tiny_text_encoder(tmp_path_factory.mktemp("text"), request.param)


def padded(folder, caption, max_tokens):
    """As diffusers' Wan pipeline: padded to the most tokens, with a mask; then the tokens alone."""
    config = transformers.AutoConfig.from_pretrained(folder)
    model = getattr(transformers, config.architectures[0]).from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    given = tokenizer(caption, padding="max_length", max_length=max_tokens, truncation=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(given.input_ids, given.attention_mask).last_hidden_state
    return hidden[0, : int(given.attention_mask.sum())]


def test_embeddings_are_those_of_the_encoder(folder):
    encoder = load_text_encoder(str(folder), max_tokens=8)
    assert encoder.width == WIDTH
    texts = [*CORPUS, "", "a car"]
    found = encoder.encode(texts)
    for text, embedding in zip(texts, found, strict=True):
        torch.testing.assert_close(embedding, padded(folder, text, 8), rtol=1e-5, atol=1e-5)
    assert len(found[-2]) == 1  # the mark of the end
    assert [encoder.is_cut(text) for text in texts] == [len(embedding) == 8 for embedding in found]
    assert any(len(embedding) == 8 for embedding in found)
    assert (found[0][0] - found[1][0]).abs().max() > 1e-3


def test_an_embedding_does_not_depend_on_the_captions_beside_it(folder):
    encoder = load_text_encoder(str(folder))
    together = encoder.encode(CORPUS)
    assert all(torch.equal(encoder.encode([text])[0], other) for text, other in zip(CORPUS, together, strict=True))


def test_the_identity_is_that_of_weights_and_tokenizer(tmp_path):
    first, same, other = (
        load_text_encoder(str(tiny_text_encoder(tmp_path / name, seed=seed)))
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first.identity == same.identity != other.identity


def test_a_pipelines_folder_holds_encoder_and_tokenizer(folder, tmp_path):
    tiny_text_encoder(tmp_path / "text_encoder")
    tiny_tokenizer(tmp_path / "tokenizer")
    for path in tmp_path.glob("text_encoder/*token*"):
        path.unlink()
    pipeline, part = load_text_encoder(str(tmp_path)), load_text_encoder(str(tmp_path / "text_encoder"))
    assert pipeline.identity == part.identity
    assert torch.equal(pipeline.encode(["a dog"])[0], part.encode(["a dog"])[0])


def test_what_cannot_be_loaded_is_a_sentence(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"cannot load the text encoder 'nowhere': .*\(there is no such folder\)"):
        load_text_encoder("nowhere")
    folder = tiny_text_encoder(tmp_path / "a")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_layers": 3}))
    with pytest.raises(ValueError, match=r"its files lack \d+ weights, for example encoder.block.2"):
        load_text_encoder(str(folder))
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="it is of the kind 'bert'; those known are umt5, t5"):
        load_text_encoder(str(folder))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"type pip install 'fvdm\[text\]'"):
        load_text_encoder(str(folder))


def test_captions_are_cleaned_as_by_diffusers():
    assert clean(" a &amp;amp; b\n\tc  ") == "a & b c"
