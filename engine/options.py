"""What the scheduler may be told."""

from __future__ import annotations

import math
from dataclasses import dataclass

from makeready.engine.errors import RequestError
from makeready.engine.kv.eviction import POLICIES as EVICTIONS
from makeready.engine.ranking import RANKINGS
from makeready.graphs.plan.plan import Plan
from makeready.graphs.plan.spec import Limits

AUTO, OFFLINE = "auto", "offline"
FCFS, LPM, DFS_WEIGHT, PRIORITY = "fcfs", "lpm", "dfs-weight", "priority"
ALWAYS, NEVER = "always", "never"
POLICIES = (AUTO, OFFLINE, FCFS, LPM, DFS_WEIGHT, *RANKINGS)


@dataclass(frozen=True)
class SchedulerOptions:
    """How requests share the device. Names are SGLang's where it has the same thing.

    Attributes:
        policy: whom to admit first. ``auto``: ``offline`` for batch jobs and ``LLM.generate``, ``fcfs`` for all
            else. ``offline``: prompts that begin alike one after the other, and towards the end of the work the
            longest outputs first. ``fcfs``: who came first. ``lpm``: who has the longest prefix in the
            cache. ``dfs-weight``: depth first through the cache, where most wait. ``lof``: who may generate
            most. ``random``. ``priority``: the highest ``Request.priority``, which also takes the place of
            running ones that are lower by ``preemption_threshold``.
        max_wait: the request that has waited longest is passed over at most so many times, then it goes
            first whatever the policy, and gives its place to no priority.
        preemption_threshold: see ``policy``.
        random_seed: of the policy of that name.
        overlap: prepare the next step while one runs, and read its tokens one step late.
        chunked_prefill_size: most prompt tokens in a step; None for what the plan's largest step leaves.
            Smaller steps make prompts slower and the time between tokens of others more even.
        decode_interval: while any request decodes, so many steps without prompt tokens lie between two with
            them. 0 brings first tokens soonest; more makes the time between tokens shorter on average.
        max_running_requests: most that run at once; None for as many as the plan has rows.
        max_queued_requests: most that wait; further ones are refused. None for no limit.
        prefix_cache: keep computed pages, and let requests that begin alike share them.
        eviction: which cached pages go first: ``lru``, ``lfu``, ``fifo`` or ``priority``.
        deterministic: what a request gets depends on itself alone, to the last bit: tokens and log-probabilities
            are the same in every batch, however its prompt is cut, from the cache or computed again. Needs a
            plan that was compiled so.
        forced_tokens: where a grammar leaves one way to go on, its tokens are taken without a choice, as the
            tokenizer cuts their text, and run in one step; they have no log-probabilities, so that requests for
            these run them one by one. Else the model chooses among all tokens that spell that text.
        speculation: whether generating rows guess tokens and check several in a step, with a plan that was
            compiled for it (``speculative.method``); the tokens are the same. ``auto``: where it should be faster by
            the plan's costs and by how many guesses were right of late. ``always``, ``never``.
        new_token_ratio: a request is admitted if pages last until all that run have ended. Of what those may
            still generate that can end before their limit, this share is expected at first; later it is learned
            from those that ended.
        min_new_token_ratio: the least share that is expected, whatever was learned; 1 for both never takes pages
            from a running request again.

    Raises:
        RequestError: a value is out of range.
    """

    policy: str = AUTO
    max_wait: int = 256
    preemption_threshold: int = 10
    random_seed: int = 0
    overlap: bool = True
    chunked_prefill_size: int | None = None
    decode_interval: int = 0
    max_running_requests: int | None = None
    max_queued_requests: int | None = None
    prefix_cache: bool = True
    eviction: str = "lru"
    deterministic: bool = False
    forced_tokens: bool = True
    speculation: str = AUTO
    new_token_ratio: float = 0.7
    min_new_token_ratio: float = 0.1

    def __post_init__(self) -> None:
        _check_choice("policy", self.policy, (AUTO, OFFLINE, FCFS, LPM, DFS_WEIGHT, *RANKINGS))
        _check_choice("speculation", self.speculation, (AUTO, ALWAYS, NEVER))
        _check_choice("eviction", self.eviction, tuple(EVICTIONS))
        for name, least in _WHOLE.items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise RequestError(
                    f"scheduler.{name}={value!r} is out of range; give a whole number of at least {least}"
                    + (", or null" if name in _OPTIONAL else "")
                )
        for name in ("overlap", "prefix_cache", "deterministic", "forced_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(
                    f"scheduler.{name}={getattr(self, name)!r} is no switch; give true or false"
                )
        for name in ("new_token_ratio", "min_new_token_ratio"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
            if not number or not 0 <= value <= 1:
                raise RequestError(f"scheduler.{name}={value!r} is out of range; give a number from 0 to 1")
        if self.min_new_token_ratio > self.new_token_ratio:
            raise RequestError(
                f"scheduler.min_new_token_ratio={self.min_new_token_ratio} is above "
                f"new_token_ratio={self.new_token_ratio}; lower it"
            )
        if self.policy in (LPM, DFS_WEIGHT) and not self.prefix_cache:
            raise RequestError(
                f"scheduler.policy={self.policy} goes by the prefix cache, which is off; "
                "set scheduler.prefix_cache=true or take another policy"
            )

    def check(self, plan: Plan) -> None:
        """Hold the options against a plan.

        Raises:
            RequestError: the plan's programs cannot do what they ask for.
        """
        if self.deterministic and not plan.options.deterministic:
            raise RequestError(
                "scheduler.deterministic=true needs a plan whose tokens depend on no batch; "
                "recompile it with plan.deterministic=true"
            )
        if self.speculation == ALWAYS and plan.limits.max_gain == 1:
            raise RequestError(
                "scheduler.speculation=always needs a plan whose steps verify drafts; "
                "recompile it with speculative.method=ngram"
            )

    def check_limits(self, limits: Limits) -> None:
        """Hold the options against a plan's limits.

        Raises:
            RequestError: its programs cannot take so much.
        """
        chunk, rows = self.chunked_prefill_size, self.max_running_requests
        if chunk is not None and chunk > limits.max_tokens:
            raise RequestError(
                f"scheduler.chunked_prefill_size={chunk} exceeds the plan's steps of {limits.max_tokens} tokens; "
                f"lower it, or recompile with plan.max_tokens={chunk}"
            )
        if rows is not None and rows > limits.max_rows:
            raise RequestError(
                f"scheduler.max_running_requests={rows} exceeds the plan's {limits.max_rows} rows; "
                f"lower it, or recompile with plan.max_rows={rows}"
            )


_WHOLE = {
    "max_wait": 0,
    "preemption_threshold": 1,
    "random_seed": 0,
    "chunked_prefill_size": 1,
    "decode_interval": 0,
    "max_running_requests": 1,
    "max_queued_requests": 1,
}
_OPTIONAL = {"chunked_prefill_size", "max_running_requests", "max_queued_requests"}


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise RequestError(f"there is no scheduler.{name}={value!r}; take one of {', '.join(choices)}")
