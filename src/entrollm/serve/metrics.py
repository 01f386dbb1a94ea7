"""Counters in Prometheus' text format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

_FIRST_TOKEN_BOUNDS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


@dataclass
class Metrics:
    """What the server has done. Each counter is written by one thread: `requests` by the HTTP side, the rest by the
    scheduler.

    Attributes:
        requests: by path, as routes write it, and status.
        prompt_tokens, reused_prompt_tokens, generated_tokens: tokens of prompts, of those the ones whose keys and
            values were in a cache, and tokens of answers.
        cancelled, expired, failed: answers that ended without their last token.
        steps, step_s: passes through a model, and seconds in them.
        guessed_tokens, right_tokens: tokens that were run before it was known that they are chosen, and those chosen.
        first_token_s: histogram of the seconds from arrival to first token, by upper bound.
    """

    requests: Counter[tuple[str, int]] = field(default_factory=Counter)
    prompt_tokens: int = 0
    reused_prompt_tokens: int = 0
    generated_tokens: int = 0
    cancelled: int = 0
    expired: int = 0
    failed: int = 0
    steps: int = 0
    step_s: float = 0.0
    guessed_tokens: int = 0
    right_tokens: int = 0
    first_token_s: Counter[float] = field(default_factory=Counter)
    first_token_sum_s: float = 0.0

    def record_first_token(self, elapsed_s: float) -> None:
        """Count a first token into the histogram."""
        bound = next((bound for bound in _FIRST_TOKEN_BOUNDS_S if elapsed_s <= bound), float("inf"))
        self.first_token_s[bound] += 1
        self.first_token_sum_s += elapsed_s

    def render(self, gauges: Mapping[str, int]) -> str:
        """All counters, and `gauges` by name, as text."""
        lines = ["# TYPE entrollm_requests_total counter"]
        for (path, status), count in sorted(self.requests.items()):
            lines.append(f'entrollm_requests_total{{path="{_escaped(path)}",status="{status}"}} {count}')
        counters: dict[str, int | float] = {
            "prompt_tokens_total": self.prompt_tokens,
            "reused_prompt_tokens_total": self.reused_prompt_tokens,
            "generated_tokens_total": self.generated_tokens,
            "cancelled_total": self.cancelled,
            "expired_total": self.expired,
            "failed_total": self.failed,
            "steps_total": self.steps,
            "step_seconds_total": self.step_s,
            "guessed_tokens_total": self.guessed_tokens,
            "right_tokens_total": self.right_tokens,
        }
        for name, value in counters.items():
            lines += [f"# TYPE entrollm_{name} counter", f"entrollm_{name} {value}"]
        for name, value in gauges.items():
            lines += [f"# TYPE entrollm_{name} gauge", f"entrollm_{name} {value}"]
        name = "entrollm_first_token_seconds"
        lines.append(f"# TYPE {name} histogram")
        total = 0
        for bound in (*_FIRST_TOKEN_BOUNDS_S, float("inf")):
            total += self.first_token_s[bound]
            lines.append(f'{name}_bucket{{le="{"+Inf" if bound == float("inf") else bound}"}} {total}')
        lines += [f"{name}_sum {self.first_token_sum_s}", f"{name}_count {total}"]
        return "\n".join(lines) + "\n"


def _escaped(label: str) -> str:
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
