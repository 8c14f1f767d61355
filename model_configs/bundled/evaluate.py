"""Measures the bundled model through llama.cpp, on documents it was not trained on.

    python model_configs/bundled/evaluate.py model_configs/bundled/h2o-stories-q8_0.gguf

Recall: a story of the given number of tokens with the asked fact at a random depth, the
facts of at least four other people strewn about, and the question at the end; right is
an answer whose first sentence, taken greedily, is exactly the expected one.  Loss: nats
per token on whole documents.  With --checkpoint the greedy text is also compared with
that of the PyTorch model.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np
import torch
from corpus import FULL, HAS, LIKES, PLACE, WORD, Fact, Mix, document, facts, sentences, unmarked
from export import load_checkpoint
from llama_cpp import Llama

SEED = 99  # training uses others
FORM_NAMES = {PLACE: "place", HAS: "has", WORD: "word", LIKES: "likes"}
PROMPTS = (
    "Once upon a time there was a girl named Mia.",
    "Tom lost his blue hat.",
    "Anna's key is in the red box. Tom's coin is in the old jar. Where is Anna's key?",
    'Ben said: "lamp, fox, river, bread." It was a sunny morning. Again Ben said: "',
    "User: Tell me a story.\nAssistant:",
)
ANSWER_ROOM = 16


def count(llama: Llama, text: str) -> int:
    """Tokens of a text, the first one of a document included."""
    return len(llama.tokenize(text.encode()))


def recall_prompt(rng: random.Random, llama: Llama, form: int, context: int, chat: bool = False) -> tuple[str, Fact]:
    """A prompt of at most `context` tokens, answer included, and the fact it asks for."""
    asked, *others = facts(rng, rng.randint(5, 9), [form])
    lines = [fact.statement() for fact in others]
    ask = f" {asked.question()}" + ("\nAssistant:" if chat else "")
    fixed = count(llama, " ".join([*lines, asked.statement()]) + ask)
    room = context - fixed - ANSWER_ROOM - 4 * chat
    tale: list[str] = []
    for line in sentences(rng, context):
        size = count(llama, line) - 1
        if size > room:
            break
        tale.append(line)
        room -= size
    for line in lines:
        tale.insert(rng.randint(0, len(tale)), line)
    tale.insert(rng.randint(0, len(tale)), asked.statement())
    return ("User: " if chat else "") + " ".join(tale) + ask, asked


def greedy(llama: Llama, prompt: str, tokens: int) -> str:
    """The most likely text after a prompt."""
    answer = llama.create_completion(prompt, max_tokens=tokens, temperature=0.0)
    return str(answer["choices"][0]["text"])  # type: ignore[index]


def recall(llama: Llama, form: int, context: int, trials: int, chat: bool = False) -> float:
    """Share of the questions that are answered exactly right."""
    rng = random.Random(f"{SEED} {form} {context} {chat}")
    right = 0
    for _ in range(trials):
        prompt, fact = recall_prompt(rng, llama, form, context, chat)
        text = greedy(llama, prompt, ANSWER_ROOM).strip()
        wanted = {fact.statement()}
        if form == PLACE:
            wanted.add(fact.short_answer())
        right += text.split(".")[0] + "." in wanted
    return right / trials


def loss(llama: Llama, mix: Mix, documents: int, words: int) -> float:
    """Mean negative log-likelihood of a token, in nats."""
    rng = random.Random(f"{SEED} loss")
    total, tokens = 0.0, 0
    for _ in range(documents):
        ids = llama.tokenize(unmarked(document(rng, mix, words)).encode())
        llama.reset()  # type: ignore[no-untyped-call]
        llama.eval(ids)
        scores = torch.from_numpy(np.array(llama.scores[: len(ids) - 1]))
        targets = torch.tensor(ids[1:])
        total += float(torch.nn.functional.cross_entropy(scores, targets, reduction="sum"))
        tokens += len(targets)
    return total / tokens


@torch.no_grad()
def torch_greedy(model: torch.nn.Module, ids: list[int], count: int) -> list[int]:
    """Greedy tokens of the PyTorch model after `ids`."""
    start = len(ids)
    for _ in range(count):
        ids = [*ids, int(model(torch.tensor([ids]))[0, -1].argmax())]
    return ids[start:]


def compare(llama: Llama, checkpoint: Path, length: int = 40) -> None:
    """Prints how long llama.cpp and PyTorch say the same tokens."""
    model, _ = load_checkpoint(checkpoint)
    for prompt in PROMPTS:
        ids = llama.tokenize(prompt.encode())
        ours = torch_greedy(model, ids, length)
        llama.reset()  # type: ignore[no-untyped-call]
        llama.eval(ids)
        theirs: list[int] = []
        for _ in range(length):
            theirs.append(int(np.argmax(llama.scores[llama.n_tokens - 1])))
            llama.eval(theirs[-1:])
        same = next((i for i in range(length) if ours[i] != theirs[i]), length)
        print(f"same greedy tokens as PyTorch: {same} of {length} after {prompt[:30]!r}")


def main() -> None:
    """Prints all figures and some text."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--checkpoint", type=Path)
    options = parser.parse_args()
    llama = Llama(str(options.model), n_ctx=1100, n_threads=options.threads, logits_all=True, verbose=False)
    for context in (512, 1024, 256, 128):
        share = recall(llama, PLACE, context, options.trials)
        print(f"recall, place, context {context}: {share:.1%}", flush=True)
    for form in (HAS, WORD, LIKES):
        share = recall(llama, form, 512, options.trials // 2)
        print(f"recall, {FORM_NAMES[form]}, context 512: {share:.1%}", flush=True)
    share = recall(llama, PLACE, 512, options.trials // 2, chat=True)
    print(f"recall, chat, context 512: {share:.1%}", flush=True)
    print(f"loss, stories: {loss(llama, Mix({'story': 1.0}, [PLACE]), 60, 100):.3f}")
    print(f"loss, whole mix: {loss(llama, FULL, 60, 350):.3f}")
    for prompt in PROMPTS:
        print(f"--- {prompt}{greedy(llama, prompt, 80)}")
    if options.checkpoint:
        compare(llama, options.checkpoint)


if __name__ == "__main__":
    main()
