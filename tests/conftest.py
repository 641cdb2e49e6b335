"""Fixtures that several test files use."""
import os

import pytest
import sentencepiece
import torch

import training.distributed
from formats.tokenizer import Tokenizer, train_tokenizer
from tests.sentencepiece_files import spaced, TEXTS, train_sentencepiece

# One thread here and in the programs that tests start: two processes of tests share the cores
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def mesh():
    """A world of one, which a process can start only once."""
    return training.distributed.start_world("cpu")


@pytest.fixture(scope="session")
def tokenizer():
    """A trained tokenizer of 500 ids."""
    return train_tokenizer(TEXTS, 500)


@pytest.fixture(scope="session", params=["trained", "spaced"])
def proto(request, tmp_path_factory):
    trained = train_sentencepiece(tmp_path_factory.mktemp("sentencepiece"))
    return trained if request.param == "trained" else spaced(trained)


@pytest.fixture(scope="session")
def slow(proto):
    """Llama's slow tokenizer: what LLaVA was trained with."""
    return sentencepiece.SentencePieceProcessor(model_proto=proto)


@pytest.fixture(scope="session")
def llama(proto, tmp_path_factory):
    """Our reading of the same file."""
    folder = tmp_path_factory.mktemp("llama")
    (folder / "tokenizer.model").write_bytes(proto)
    return Tokenizer.load(folder)
