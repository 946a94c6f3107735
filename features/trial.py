"""The trial: a child process in which a grammar is compiled before this process compiles it.

Grammars come from strangers, and llguidance trusts them: some hang it, some end the process, some
fill the memory. The child has limits of time, of address space and of stack; when it dies or does
not answer, it is replaced, and the grammar is refused. It is no feature by itself: replies.py
asks it. It costs 0.1 s once, and about a millisecond for each grammar.
"""

import contextlib
import functools
import json
import math
import os
import select
import subprocess
import sys
import threading
import time

# llguidance's limits for one token: a millisecond is 14,000 units of lexer fuel, or 20,000 items;
# and for all of a reply: 2 KB for each state of the lexer. Its others are as it has them.
LIMITS = {"step_lexer_fuel": 200_000, "step_max_items": 50_000, "max_lexer_states": 50_000,
          "verbose_errors": False}
# Where only one text may come, the model chooses its tokens, not llguidance.
FREELY = '%llguidance {"no_forcing": true}\n'


@functools.cache
def library():
    """llguidance, imported when first used. Raises ImportError."""
    import llguidance
    return llguidance


CHILD = """
import json, resource, signal, sys, threading
import llguidance
from llguidance.gbnf_to_lark import gbnf_to_lark

def compile(vocabulary, limits, asked):
    lark = asked["lark"] if "lark" in asked else head + gbnf_to_lark(asked["gbnf"])
    grammar = llguidance.LLMatcher.grammar_from_lark(lark)
    matcher = llguidance.LLMatcher(vocabulary, grammar, log_level=0, limits=limits)
    for _ in range(asked["n_steps"]):  # what only shows while it is used
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        if matcher.is_stopped() or not mask:
            break
        matcher.consume_token((mask & -mask).bit_length() - 1)
    return {"error": matcher.get_error()} if matcher.is_error() else {"lark": grammar}

def answer_all():
    vocabulary, options = llguidance.LLTokenizer("byte"), llguidance.LLParserLimits(**limits)
    print(flush=True)  # ready
    for line in sys.stdin:
        signal.alarm(n_seconds)  # ends a child whose server is gone
        try:
            answer = compile(vocabulary, options, json.loads(line))
        except Exception as error:
            answer = {"error": str(error) or type(error).__name__}
        signal.alarm(0)
        print(json.dumps(answer), flush=True)

n_bytes, n_stack, n_seconds, limits, head = json.loads(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (n_bytes, n_bytes))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
threading.stack_size(n_stack)
threading.Thread(target=answer_all).start()
"""


def has_answered(child: subprocess.Popen, seconds: float) -> bool:
    """Wait for a child to write, or to end."""
    waiting = select.poll()  # select.select cannot wait for descriptors beyond 1023
    waiting.register(child.stdout)
    return bool(waiting.poll(1000 * seconds))


class Trial:
    """A child process that compiles what was sent before this process does. Safe to use from any
    thread; one question at a time."""

    SECONDS = 3.0  # the largest of real schemas take 0.3
    START_SECONDS = 30.0  # it takes 0.13
    PATIENCE, NICENESS = 0.1, 10  # who takes longer than that computes behind the streams
    MAX_BYTES = 2**30  # of address space
    STACK_BYTES = 2**22  # half of what a thread of ours has: what fits there is sure to fit here
    N_STEPS = 8  # tokens written at random, to see what they take

    def __init__(self):
        self._child: subprocess.Popen | None = None
        self._lock = threading.Lock()  # held for one question

    def run(self, question: dict) -> dict:
        """Compile {"lark": ...} or {"gbnf": ...}; the grammar for LLMatcher as {"lark": ...}, or
        what is wrong with it as {"error": ...}; as {"limit": ...} what it takes too much of."""
        line = json.dumps({**question, "n_steps": self.N_STEPS}).encode() + b"\n"
        with self._lock:
            try:
                for _ in range(2):  # the first child may have been ended from outside, long ago
                    self._child = self._child or self._start()
                    with contextlib.suppress(BrokenPipeError):
                        return self._ask(line)
                    self._end()
            except OSError as error:  # no memory or no descriptor for a child
                return {"limit": f"the process that tries grammars out cannot be started: {error}"}
            except BaseException:  # its answer, still in the pipe, is nobody else's
                self._end()
                raise
        return {"limit": "the process that tries grammars out ends as soon as it is started"}

    def _ask(self, line: bytes) -> dict:
        """One question to the child, and its answer. Raises BrokenPipeError if it has ended."""
        child, until = self._child, time.monotonic() + self.SECONDS
        child.stdin.write(line)
        child.stdin.flush()
        is_quick = has_answered(child, self.PATIENCE)
        if not is_quick:
            with contextlib.suppress(OSError):  # it has ended
                os.setpriority(os.PRIO_PGRP, child.pid, self.NICENESS)
        answer = child.stdout.readline() if is_quick or has_answered(
            child, max(0, self.SECONDS - self.PATIENCE)) else b""
        if not (is_quick and answer):
            self._end()  # it is gone, or niced: the next one starts as any process
        if answer.endswith(b"\n"):
            return json.loads(answer)
        return {"limit": f"it takes more than {self.SECONDS:g} seconds to compile; make it smaller"
                         if time.monotonic() >= until else
                         "it is nested too deeply or needs too much memory"}

    def _start(self) -> subprocess.Popen:
        """A new child, ready to be asked."""
        child = subprocess.Popen(  # Ctrl-C is the server's: a session of its own
            [sys.executable, "-c", CHILD, json.dumps([self.MAX_BYTES, self.STACK_BYTES,
                                                      2 * math.ceil(self.SECONDS), LIMITS,
                                                      FREELY])],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            start_new_session=True)
        is_ready = False
        try:
            is_ready = has_answered(child, self.START_SECONDS)
        finally:
            if not is_ready:
                child.kill()
                child.wait()
        child.stdout.readline()  # or its end, which the first question finds
        return child

    def _end(self) -> None:
        """Let go of a child that cannot be used any more, if there is one."""
        if self._child is None:
            return
        with contextlib.suppress(OSError):
            self._child.kill()
            self._child.stdin.close()
        self._child.stdout.close()
        self._child.wait()
        self._child = None


trial = Trial()
