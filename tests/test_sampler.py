import ctypes

import llama_cpp
import numpy as np
import pytest
from engines import engine

from runtime.answer.sampler import Sampler, Sampling
from runtime.errors import UsageError
from runtime.llama import context
from runtime.llama.compiled import LIBRARY
from runtime.plans.ledger import SAMPLER_BYTES_PER_TOKEN

PROMPT = list(range(3, 15))
SETTINGS = [
    Sampling(temp=0.8, seed=1),
    Sampling(temp=1.5, top_k=0, top_p=1.0, min_p=0.0, seed=77),
    Sampling(temp=1.0, repeat_penalty=1.3, seed=5),
    Sampling(temp=1.2, top_k=0, top_p=0.7, seed=9),
    Sampling(temp=0.0, repeat_penalty=1.2),
]


@pytest.fixture(scope="module")
def opened(tiny_model):
    with engine(tiny_model("qwen2"), n_threads=2) as opened:
        yield opened


def own_chain(sampling, n_vocab):
    """llama.cpp's chain in the order of its command line tool."""
    chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
    parts = [llama_cpp.llama_sampler_init_penalties(n_vocab, 64, sampling.repeat_penalty, 0.0, 0.0)]
    if sampling.temp:
        parts += [
            llama_cpp.llama_sampler_init_top_k(sampling.top_k),
            llama_cpp.llama_sampler_init_top_p(sampling.top_p, 0),
            llama_cpp.llama_sampler_init_min_p(sampling.min_p, 0),
            llama_cpp.llama_sampler_init_temp(sampling.temp),
            llama_cpp.llama_sampler_init_dist(sampling.seed),
        ]
    else:
        parts.append(llama_cpp.llama_sampler_init_greedy())
    for part in parts:
        llama_cpp.llama_sampler_chain_add(chain, part)
    return chain


def choose(chain, logits):
    """Apply a chain to an array of logits."""
    candidates = (llama_cpp.llama_token_data * len(logits))()
    for i, logit in enumerate(logits):
        candidates[i].id, candidates[i].logit = i, float(logit)
    array = llama_cpp.llama_token_data_array(candidates, len(logits), -1, False)
    llama_cpp.llama_sampler_apply(chain, array)
    token = array.data[array.selected].id
    llama_cpp.llama_sampler_accept(chain, token)
    return int(token)


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_same_choices_as_llama_cpp(sampling, opened):
    opened.truncate(0)
    opened.forward(PROMPT)
    mine, chain = Sampler(sampling, opened.n_vocab), own_chain(sampling, opened.n_vocab)
    mine.accept(PROMPT)
    for token in PROMPT:
        llama_cpp.llama_sampler_accept(chain, token)
    for _ in range(12):
        logits = opened.logits().copy()
        token = mine.sample(opened)
        assert token == choose(chain, logits)
        opened.forward([token])
    mine.close()
    llama_cpp.llama_sampler_free(chain)


def test_greedy_is_the_largest_logit_and_suppressed_tokens_never_come(opened):
    opened.truncate(0)
    opened.forward(PROMPT)
    order = [int(i) for i in np.argsort(-opened.logits())]
    sampler = Sampler(Sampling(temp=0), opened.n_vocab)
    assert sampler.sample(opened) == order[0]
    sampler.close()
    suppressing = Sampler(Sampling(temp=0), opened.n_vocab, suppressed=order[:3])
    assert suppressing.sample(opened) == order[3]
    suppressing.close()


@pytest.mark.skipif(LIBRARY is None, reason="built without a compiler")
@pytest.mark.parametrize("n", [1, 15, 16, 17, 1023, 1024, 1025, 49152, 50001])
def test_the_likeliest_token_is_that_of_llama_cpp(n):
    """The first of the largest ones; what is no number counts as llama.cpp counts it."""
    random = np.random.default_rng(n)
    chain = llama_cpp.llama_sampler_init_greedy()
    for case in range(12):
        row = random.standard_normal(n).astype(np.float32)
        if case % 4 == 1:
            row = np.round(row)  # many are the largest
        elif case % 4 == 2:
            row[random.integers(0, n, 1 + n // 9)] = random.choice([np.nan, -np.inf])
        elif case % 4 == 3:
            row[:] = -np.inf
        if case == 6:
            row[0] = np.nan
        found = LIBRARY.h2o_argmax(row.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), n)
        assert found == choose(chain, row), (n, case)
    llama_cpp.llama_sampler_free(chain)


def test_the_likeliest_of_all_outputs(opened):
    if not LIBRARY:
        pytest.skip("the package was built without a compiler")
    opened.truncate(0)
    opened.forward(PROMPT)
    assert opened.likeliest_of_all() == [opened.likeliest()]
    opened.logits()[0] = np.nan  # the first one is chosen then
    assert opened.likeliest_of_all() == [-1]


def test_many_samplers_have_one_list_of_candidates(bundled_model):
    with engine(bundled_model) as opened:
        opened.forward(PROMPT)
        list_bytes = opened.n_vocab * SAMPLER_BYTES_PER_TOKEN
        wide = Sampling(temp=1.0, top_k=0, top_p=0.9999999, min_p=0.0, seed=1)
        samplers = [Sampler(wide if i % 2 else Sampling(seed=1), opened.n_vocab) for i in range(20)]
        before = allocated_bytes()
        for sampler in samplers:
            sampler.sample(opened)
        assert allocated_bytes() - before <= 3 * list_bytes  # a vector is at most twice as large as it has to be
        for sampler in samplers:
            sampler.close()


def allocated_bytes():
    """What malloc has handed out in this process."""

    class Info(ctypes.Structure):
        """struct mallinfo2."""

        _fields_ = [(name, ctypes.c_size_t) for name in "abcdefghij"]

    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = Info
    info = mallinfo()
    return info.e + info.h  # mapped, and in use elsewhere


def test_without_the_compiled_function_the_choice_is_the_same(opened, monkeypatch):
    opened.truncate(0)
    opened.forward(PROMPT)
    sampler = Sampler(Sampling(temp=0), opened.n_vocab)
    choices = [sampler.sample(opened)]
    monkeypatch.setattr(context, "LIBRARY", None)
    assert opened.likeliest() is None
    choices.append(sampler.sample(opened))
    sampler.close()
    assert choices[0] == choices[1]


def test_seed_is_random_unless_given(opened):
    seeds = {Sampler(Sampling(), opened.n_vocab).seed for _ in range(3)}
    assert len(seeds) == 3
    assert Sampler(Sampling(seed=9), opened.n_vocab).seed == 9


def test_the_same_seed_gives_the_same_random_numbers(opened):
    opened.truncate(0)
    opened.forward(PROMPT)
    answers = []
    for _ in range(2):
        sampler = Sampler(Sampling(temp=2.0, top_k=0, top_p=1.0, min_p=0.0, seed=3), opened.n_vocab)
        answers.append([sampler.sample(opened) for _ in range(8)])
        sampler.close()
    assert answers[0] == answers[1]
    assert len(set(answers[0])) > 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"temp": -1},
        {"temp": float("nan")},
        {"top_k": -1},
        {"top_p": 0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"repeat_penalty": 0},
        {"seed": -1},
        {"seed": 2**32},
    ],
    ids=str,
)
def test_impossible_settings(wrong):
    with pytest.raises(UsageError):
        Sampling(**wrong)
