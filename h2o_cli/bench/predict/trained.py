"""Two small networks that learn from the first swap-ins which one comes next. They need torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from h2o_cli.bench.predict.rules import Guesses
from h2o_cli.bench.predict.sequences import first_of_test
from h2o_cli.bench.predict.windows import nearest_id, windows
from runtime.errors import UsageError

CLASSIFIER, REGRESSOR = "classifier", "regressor"
_WIDTH, _RATE, _BATCH = 32, 1e-3, 2
_DECAY_EPOCHS, _DECAY = 10, 0.1


class NoTorch(UsageError):
    """The extra is not installed."""


@dataclass(frozen=True)
class Training:
    """How to train. None: what the source has, 5 and 2 ids, 30 and 10 epochs."""

    window_size: int | None = None
    mod: int = 100
    seed: int = 0
    epochs: int | None = None


def trained(ids: Sequence[int], training: Training) -> dict[str, Guesses]:
    """What both say before each swap-in of the test; None elsewhere, and where the window is longer than all before.

    They learn from what is before the test only. Raises NoTorch, and UsageError where no window fits before the test.
    """
    try:
        import torch
    except ImportError as error:
        raise NoTorch(
            "trained predictors need the Python package torch", "in the project's folder: pip install '.[predict]'"
        ) from error
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # layers of 32: more threads only wait for each other
    try:
        return {CLASSIFIER: _classifier(ids, training), REGRESSOR: _regressor(ids, training)}
    finally:
        torch.set_num_threads(before)


def _classifier(ids: Sequence[int], training: Training) -> Guesses:
    """Classes are residues of ids; the nearest id to the last one stands for its class."""
    import torch

    mod, size = training.mod, training.window_size or 5

    def one_hots(window: Any) -> Any:
        return torch.nn.functional.one_hot(torch.tensor(window) % mod, mod).flatten(1).float()

    def classes(labels: Sequence[int]) -> Any:
        return torch.tensor([number % mod for number in labels])

    return _learn(
        ids,
        size,
        _Task((size * mod, mod), one_hots, classes, torch.nn.CrossEntropyLoss(), training.epochs or 30, decays=True),
        training.seed,
        lambda outputs, last: nearest_id(int(outputs.argmax()), last, mod),
    )


def _regressor(ids: Sequence[int], training: Training) -> Guesses:
    """The number that comes out is rounded to the nearest id."""
    import torch

    size = training.window_size or 2

    def column(labels: Sequence[int]) -> Any:
        return torch.tensor(labels, dtype=torch.float32).unsqueeze(1)

    def raw(window: Sequence[Sequence[int]]) -> Any:
        return torch.tensor(window, dtype=torch.float32)

    return _learn(
        ids,
        size,
        _Task((size, 1), raw, column, torch.nn.MSELoss(), training.epochs or 10),
        training.seed,
        lambda outputs, _last: round(float(outputs)) if outputs.isfinite() else None,
    )


@dataclass(frozen=True)
class _Task:
    """widths: of input and output. inputs, labels: as tensors, a row for each window. decays: the rate does."""

    widths: tuple[int, int]
    inputs: Callable[[Any], Any]
    labels: Callable[[Sequence[int]], Any]
    loss: Any
    epochs: int
    decays: bool = False


def _learn(ids: Sequence[int], size: int, task: _Task, seed: int, as_id: Callable[[Any, int], int | None]) -> Guesses:
    import torch

    split = first_of_test(len(ids))
    seen, labels = windows(ids, size, 0, split)
    if not seen:
        raise UsageError(f"no {size} swap-ins and one to learn are before the test", "give a smaller --window-size")
    torch.manual_seed(seed)
    width_in, width_out = task.widths
    network = torch.nn.Sequential(
        torch.nn.Linear(width_in, _WIDTH),
        torch.nn.ReLU(),
        torch.nn.Linear(_WIDTH, _WIDTH),
        torch.nn.ReLU(),
        torch.nn.Linear(_WIDTH, width_out),
    )
    _train(network, task, task.inputs(seen), task.labels(labels))
    asked, _ = windows(ids, size, split, len(ids))
    with torch.no_grad():
        outputs = network(task.inputs(asked))
    found = [as_id(row, window[-1]) for row, window in zip(outputs, asked, strict=True)]
    return [*[None] * (len(ids) - len(found)), *found]


def _train(network: Any, task: _Task, inputs: Any, labels: Any) -> None:
    import torch

    adam = torch.optim.Adam(network.parameters(), lr=_RATE)
    for epoch in range(task.epochs):
        if task.decays:
            for group in adam.param_groups:
                group["lr"] = _RATE * _DECAY ** (epoch // _DECAY_EPOCHS)
        for chosen in torch.randperm(len(inputs)).split(_BATCH):
            adam.zero_grad()
            task.loss(network(inputs[chosen]), labels[chosen]).backward()
            adam.step()
