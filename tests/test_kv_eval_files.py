"""The file of filter layers: found by the model's hash, refused when it is damaged."""

import json

import msgspec
import pytest

from h2o_cli.session import kv_layers
from h2o_cli.session.kv_config import read_config
from h2o_cli.session.kv_filter import KvFlags, choose_filter
from profiler.kv_eval.layers_file import SCHEMA, Candidate, LayerChoice, layers_path, load_choice, save_choice
from runtime.errors import ProfileError
from runtime.kv.options import DEFAULT_SELECT

HASH = 0x1234_5678_9ABC


def choice(**changes):
    fields = {
        "schema": SCHEMA,
        "model_hash": HASH,
        "model": "tiny",
        "n_layers": 3,
        "layers": (1,),
        "wait": 0,
        "select": "softmax",
        "keep": 0.1,
        "lengths": (1024, 512),
        "n_prompts": 2,
        "n_steps": 5,
        "layer_numbers": (0, 1, 2),
        "similarity": ((1.0, 0.5, 0.5),) * 3,
        "curves": {3: (0.6, 0.7, 1.0)},
        "candidates": (Candidate((1,), 0, "softmax", 2 / 3, 0.9, n_prompts=2, kl=0.01, same=0.5),),
        "versions": {},
    }
    return LayerChoice(**{**fields, **changes})


@pytest.fixture
def folders(tmp_path, monkeypatch):
    own, bundled = tmp_path / "own", tmp_path / "bundled"
    own.mkdir()
    bundled.mkdir()
    monkeypatch.setattr(kv_layers, "profiles_folder", lambda: own)
    monkeypatch.setattr(kv_layers, "BUNDLED_MODEL", bundled / "model.gguf")
    return own, bundled


def test_what_is_written_is_read_back(tmp_path):
    path = layers_path(tmp_path, HASH)
    save_choice(choice(), path)
    assert load_choice(path) == choice()


def test_layers_are_found_by_hash_and_the_users_own_first(folders):
    own, bundled = folders
    assert kv_layers.find_choice(HASH) is None
    save_choice(choice(layers=(0,)), layers_path(bundled, HASH))
    assert kv_layers.find_choice(HASH).layers == (0,)
    save_choice(choice(layers=(1,)), layers_path(own, HASH))
    assert kv_layers.find_choice(HASH).layers == (1,)
    assert kv_layers.find_choice(HASH + 1) is None


@pytest.mark.parametrize(
    ("flags", "config", "expected"),
    [
        ({}, {}, ((1,), 0, "softmax")),
        ({"select": "exp"}, {}, ((1,), 0, "exp")),
        ({"wait": 2}, {}, ((1,), 2, "softmax")),
        ({"layers": "0"}, {}, ((0,), 1, DEFAULT_SELECT)),
        ({}, {"selector_cls": "last"}, ((1,), 0, "last")),
        ({}, {"num_wait_load_layers": 1}, ((1,), 1, "last")),
        ({"select": "softmax"}, {"do_select_layers": "2"}, ((2,), 1, "softmax")),
    ],
)
def test_what_a_run_takes_from_the_file(folders, tmp_path, flags, config, expected):
    save_choice(choice(), layers_path(folders[0], HASH))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    chosen = choose_filter(KvFlags(on=True, **flags), read_config(path) if config else None)
    found = chosen.for_model(HASH)
    assert (found.layers, found.wait, found.select) == expected


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema": 1}, "schema 1 is not 2"),
        ({"select": "best"}, "select"),
        ({"layers": [2, 1]}, "no rising list"),
        ({"layers": [3]}, "no rising list"),
        ({"layers": []}, "length >= 1"),
        ({"keep": 2}, "<= 1"),
        ({"wait": None}, "wait"),
    ],
)
def test_a_file_that_cannot_be_right_is_refused(folders, change, words):
    path = layers_path(folders[0], HASH)
    path.write_text(json.dumps({**msgspec.to_builtins(choice(), str_keys=True), **change}))
    with pytest.raises(ProfileError, match=words):
        kv_layers.find_choice(HASH)


def test_damage_is_one_line(folders):
    path = layers_path(folders[0], HASH)
    path.write_bytes(b"\xff{")
    with pytest.raises(ProfileError, match="cannot be used"):
        kv_layers.find_choice(HASH)
