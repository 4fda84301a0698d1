"""Sample many completions at once with llama.cpp."""

from __future__ import annotations

from kardia.llama.sampling import Sampling, sample


class Rollout:
    """A rollout in progress. Sequence i writes sample `live[i]`, which answers prompt `live[i] // group`."""

    def __init__(
        self, engine, entry, how: Sampling, prompts, group: int, seeds, parallel: int, longest: int
    ) -> None:
        """Prepare a context for `parallel` sequences or one group, and prompts of `longest` tokens."""
        import numpy as np

        self.engine, self.entry, self.how = engine, entry, how
        self.prompts, self.group = prompts, group
        self.samples: list[dict] = [{"ids": [], "logprobs": []} for _ in range(len(prompts) * group)]
        self.rngs = [np.random.default_rng(seed) for seed in seeds]
        self.live: list[int] = []
        self.waiting = list(range(len(prompts)))[::-1]
        groups = min(len(prompts), max(1, parallel // group))
        self.capacity = groups * group  # sequences at once
        longest = max(longest, *map(len, prompts))
        unified = group > 1 and (entry.on_gpu or not entry.fused)
        tokens = longest + group * how.max_tokens if unified else group * (longest + how.max_tokens)
        self.memory = engine.context(entry, groups * tokens, self.capacity, unified)
        self.logits = np.empty((self.capacity, entry.n_vocab), np.float32)  # of the live sequences, in order

    def run(self, stream: bool) -> list[dict]:
        """Return the samples; report each token as it is drawn (`stream`), or how many have ended."""
        ended = 0
        while self.waiting or self.live:
            # A waiting prompt takes the place of completions that have ended.
            while self.waiting and len(self.live) + self.group <= self.capacity:
                self._start(self.waiting.pop())
            tokens = self._draw()
            if stream:
                for token in tokens:
                    self.engine.on_progress(token)
            for sequence in reversed(range(len(self.live))):
                ids = self.samples[self.live[sequence]]["ids"]
                if ids[-1] in self.how.stop or len(ids) == self.how.max_tokens:
                    self._retire(sequence)
                    ended += 1
                    if not stream:
                        self.engine.on_progress(ended)
            if self.live:
                self._decode_drawn()
        return self.samples

    def _start(self, prompt: int) -> None:
        """Decode a prompt once; share or copy its cells with the other sequences of its group."""
        first = len(self.live)
        end = first + self.group
        self.logits[first:end] = self.engine.prompt(self.entry, self.prompts[prompt], first)  # [G, V]
        for sequence in range(first + 1, end):
            self.engine.lib.llama_memory_seq_cp(self.memory, first, sequence, -1, -1)
        self.live += range(prompt * self.group, (prompt + 1) * self.group)

    def _draw(self) -> list[int]:
        rngs = [self.rngs[number] for number in self.live]
        tokens, logps = sample(self.logits[: len(self.live)], self.how, rngs)
        for number, token, logp in zip(self.live, tokens, logps):
            self.samples[number]["ids"].append(int(token))
            self.samples[number]["logprobs"].append(float(logp))
        return [int(token) for token in tokens]

    def _retire(self, sequence: int) -> None:
        """End a sequence. The last one takes its number: streams are decoded at once only without a gap."""
        lib, last = self.engine.lib, len(self.live) - 1
        lib.llama_memory_seq_rm(self.memory, sequence, -1, -1)
        if sequence != last:
            lib.llama_memory_seq_cp(self.memory, last, sequence, -1, -1)
            lib.llama_memory_seq_rm(self.memory, last, -1, -1)
            self.live[sequence] = self.live[last]
        self.live.pop()

    def _decode_drawn(self) -> None:
        """Decode the last token of every live sequence in one batch; keep the next logits."""
        tokens = []
        for sequence, number in enumerate(self.live):
            ids = self.samples[number]["ids"]
            position = len(self.prompts[number // self.group]) + len(ids) - 1
            tokens.append((ids[-1], position, [sequence], True))
        self.engine.decode(self.entry, tokens)
        for sequence in range(len(self.live)):
            self.logits[sequence] = self.engine.logits(self.entry, sequence)
