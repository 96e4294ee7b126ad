"""Embedders on models small enough to be made here."""

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaModel

from distrl.errors import ConfigError
from distrl.semantics.embed_config import SentenceTransformersConfig, TransformersConfig
from distrl.semantics.local_embedders import SentenceEmbedder, TransformersEmbedder

PADDING, POSITIONS = 1, 12
LONGEST = POSITIONS - PADDING - 1


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    """The folder of a model of 12 positions, 2 of them before the first token's."""
    folder = tmp_path_factory.mktemp("roberta")
    words = {"<unk>": 0, "<pad>": PADDING, **{f"w{number}": number + 2 for number in range(30)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", model_max_length=1000
    )
    fast.save_pretrained(folder)
    config = RobertaConfig(
        vocab_size=len(words),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=POSITIONS,
        pad_token_id=PADDING,
    )
    torch.manual_seed(0)
    RobertaModel(config).save_pretrained(folder)
    return folder


def text_of(count):
    return " ".join(f"w{number}" for number in range(count))


def of_transformers(folder, **settings):
    config = TransformersConfig(kind="transformers", folder=str(folder), **settings)
    return TransformersEmbedder(config, folder, "cpu")


def of_sentence_transformers(folder, **settings):
    config = SentenceTransformersConfig(folder=str(folder), **settings)
    return SentenceEmbedder(config, folder, "cpu")


@pytest.fixture(params=["transformers", "sentence_transformers"])
def embedder_of(request, roberta, tmp_path):
    """Makes an embedder of the model, by either library."""
    if request.param == "transformers":
        return lambda **settings: of_transformers(roberta, **settings)
    SentenceTransformer(modules=[Transformer(str(roberta)), Pooling(8)]).save(str(tmp_path))
    return lambda **settings: of_sentence_transformers(tmp_path, **settings)


def test_a_long_text_is_cut_to_the_positions_that_tokens_have(embedder_of):
    long, longest, shorter = embedder_of().embed(
        [text_of(30), text_of(LONGEST), text_of(LONGEST - 1)]
    )
    assert np.abs(long - longest).max() < 1e-6
    assert np.abs(long - shorter).max() > 1e-3


def test_more_tokens_than_have_positions_are_refused(embedder_of):
    assert embedder_of(max_tokens=LONGEST).embed([text_of(30)]).shape == (1, 8)
    with pytest.raises(ConfigError, match=f"max_tokens=11: the model reads {LONGEST} tokens"):
        embedder_of(max_tokens=LONGEST + 1)
