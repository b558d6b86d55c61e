"""The thread that hands items to workers, and takes the worker from an item that does not end.

It waits on sockets only. A worker that is slow (it had more time of its own than its item's patience, and than four
times what the verifier's answers take on average, turn.py) no longer counts as one of the `workers`, and another is
started for those that wait. If it spins, it also stands aside for a while, stopped, until none waits. So a hanging
answer holds up no other. A worker that gets no time, on a busy machine, is not slow, and nobody is started for it.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import threading
import time
from collections import deque
from typing import Any

from cipo_fast.verify.verdict import Judgement, VerifierFailure
from cipo_fast.verify.workers.frames import Inbox, Message
from cipo_fast.verify.workers.home import Home
from cipo_fast.verify.workers.turn import Item, Turn

MAX_PROCESSES = 64  # workers, slow ones and those about to die among them, where that many cores would not do
JOBS = 1000  # of one worker: sympy's caches grow
LOAD_S = 60.0  # to import a user's file
START_S = 150.0  # of a worker, the nursery's own start before it
REST_S = 1.0  # before the next try, when there is no room for one more worker
LAST_WORD_S = 5.0  # between a closed socket and the news of how its worker ended
FAILED_STARTS = 3  # in a row: no worker can be started here
ASSUMED_S = 0.05  # an answer's own time, on average, before any was judged
_SIGXCPU = 24


class _Worker:
    def __init__(self, number: int, sock: socket.socket, item: Item | None):
        self.number, self.sock = number, sock
        self.meant_for = item  # one that was lost once: tried again on a worker that nothing has touched
        self.item: Item | None = None
        self.turn: Turn | None = None  # while it judges the item
        self.pid = 0
        self.ready = self.ending = False
        self.inbox = Inbox()
        self.outbox = memoryview(b"")
        self.due = 0.0
        self.jobs = 0

    @property
    def idle(self) -> bool:
        return self.ready and self.pid > 0 and self.item is None and not self.ending

    @property
    def counts(self) -> bool:
        return not (self.turn and self.turn.slow) and not self.ending


class Dispatcher:
    """Owns the nursery and the workers. `put` and `close` may be called by any thread."""

    def __init__(self, workers: int, memory_mib: int):
        self._limit, self._memory_mib = workers, memory_mib
        self._most = max(MAX_PROCESSES, 2 * workers)
        self._open: set[Item] = set()  # all that have no result yet
        self._arrived: deque[Item] = deque()
        self._waiting: deque[Item] = deque()
        self._again: deque[Item] = deque()
        self._workers: dict[int, _Worker] = {}
        self._average_s: dict[str, float] = {}
        self._cores = len(os.sched_getaffinity(0))
        self._home: Home | None = None
        self._next, self._failed_starts, self._rest_until = 1, 0, 0.0
        self._closing, self._lock = False, threading.Lock()
        self._selector = selectors.DefaultSelector()
        self._bell, self._ear = socket.socketpair()
        self._bell.setblocking(False)
        self._ear.setblocking(False)
        self._selector.register(self._ear, selectors.EVENT_READ, self._listen)
        self._thread = threading.Thread(target=self._run, name="judges", daemon=True)
        self._thread.start()

    def put(self, item: Item) -> None:
        with self._lock:
            if not self._closing:
                self._open.add(item)
                item.future.add_done_callback(lambda _: self._open.discard(item))
                self._arrived.append(item)
                self._ring()
                return
        item.future.set_exception(VerifierFailure("the judges have stopped"))

    def close(self) -> None:
        with self._lock:
            self._closing = True
            self._ring()
        self._thread.join()

    def _ring(self) -> None:
        with contextlib.suppress(OSError):  # a full bell rings, too
            self._bell.send(b"!")

    def _run(self) -> None:
        reason = "the judges were closed"
        try:
            while not self._closing:
                for key, events in self._selector.select(self._patience()):
                    if key.data is not None:
                        key.data(events)
                self._look_at_clock()
                self._fill()
        except BaseException as error:  # a fault in here must not leave anybody waiting
            reason = f"the judges broke down: {type(error).__name__}: {error}"
        self._shut(reason)

    def _shut(self, reason: str) -> None:
        with self._lock:
            self._closing = True
        for worker in self._workers.values():
            worker.sock.close()
        for item in list(self._open):
            _fail(item, reason)
        if self._home is not None:
            self._home.leave()
        self._selector.close()
        self._bell.close()
        self._ear.close()

    def _listen(self, _: int) -> None:
        with contextlib.suppress(BlockingIOError):
            self._ear.recv(1 << 16)
        with self._lock:
            self._waiting += self._arrived
            self._arrived.clear()

    # --- time

    def _patience(self) -> float | None:
        """Until something is due, in seconds."""
        due = [worker.due for worker in self._workers.values() if worker.due]
        due += [worker.turn.next_look for worker in self._workers.values() if worker.turn and not worker.ending]
        if self._workers:
            due.append(time.monotonic() + REST_S)  # is the nursery stuck? is there room for a worker?
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _look_at_clock(self) -> None:
        if self._home is not None and self._home.stuck:
            self._nursery_lost("it does not answer")
        now = time.monotonic()
        spinning = sum(worker.turn.spins for worker in self._workers.values() if worker.turn)
        for worker in list(self._workers.values()):
            if worker.due and now >= worker.due:
                self._overdue(worker)
            elif worker.item and worker.turn and not worker.ending:
                self._take_turn(worker, worker.item, worker.turn, spinning)

    def _take_turn(self, worker: _Worker, item: Item, turn: Turn, spinning: int) -> None:
        room = len(self._workers) < self._most  # for one more that could work
        if turn.aside and (turn.stood_long or not self._waiting or not room):
            turn.go_on()
            self._ask("go", worker)
        if time.monotonic() < turn.next_look:
            return
        was_slow = turn.slow
        turn.look(self._average_s.get(item.verifier, ASSUMED_S), spinning, self._cores)
        end = turn.end()
        if end is not None:
            worker.item, worker.turn = None, None
            item.future.set_exception(end) if isinstance(end, VerifierFailure) else item.future.set_result(end)
            self._kill(worker)
        elif turn.spins and not was_slow and self._waiting and room and item.verifier != "code":
            turn.step_aside()  # a code row's programs have limits by the clock
            self._ask("stop", worker)

    def _overdue(self, worker: _Worker) -> None:
        """It does not start, does not import a file, or is not said to be dead: nothing that an answer could do."""
        worker.due = 0.0
        if worker.item is not None and worker.ending:
            self._ended(worker, None)  # its socket closed, and nobody said why
            return
        if worker.item is not None:
            _fail(worker.item, f"{worker.item.verifier} took more than {LOAD_S:g} s to import")
            worker.item = None
        self._kill(worker)

    # --- workers

    def _fill(self) -> None:
        """Items to idle workers; new workers for the items that are left."""
        idle = [worker for worker in self._workers.values() if worker.idle]
        for worker in idle:
            item = worker.meant_for or (self._waiting.popleft() if self._waiting else None)
            worker.meant_for = None
            if item is not None and _wanted(item):
                self._hand(worker, item)
        if time.monotonic() < self._rest_until:
            return
        while self._again and len(self._workers) < self._most and self._start(self._again.popleft()):
            pass
        starting = sum(not w.ready and not w.ending and w.meant_for is None for w in self._workers.values())
        while starting < len(self._waiting) and len(self._workers) < self._most:
            if self._full or not self._start(None):
                break
            starting += 1

    @property
    def _full(self) -> bool:
        """No more workers now: those that are not slow are as many as they should be, or twice as many while others are
        slow, so that answers that hang are found soon."""
        slow = sum(worker.turn is not None and worker.turn.slow for worker in self._workers.values())
        return sum(worker.counts for worker in self._workers.values()) >= self._limit + min(slow, self._limit)

    def _start(self, item: Item | None) -> bool:
        """A worker; `item` waits for it. False where none could be started, and the item has failed or waits again."""
        try:
            if self._home is None:
                self._home = Home()
                self._selector.register(self._home.control, selectors.EVENT_READ, self._hear)
            ours, theirs = socket.socketpair()
        except OSError as error:
            self._not_started(item, f"no worker can be started: {error}")
            return False
        worker = _Worker(self._next, ours, item)
        worker.due = time.monotonic() + START_S
        self._next += 1
        self._workers[worker.number] = worker
        ours.setblocking(False)
        self._selector.register(ours, selectors.EVENT_READ, lambda events: self._exchange(worker, events))
        with theirs:
            try:
                self._home.fork(worker.number, self._memory_mib, theirs)
            except OSError:
                self._nursery_lost("it does not listen")
                return False
        return True

    def _not_started(self, item: Item | None, reason: str) -> None:
        """Tried again, a few times; then everybody who waits is told. While others work there is no hurry."""
        if item is not None:
            self._again.append(item)
        if any(worker.ready and not worker.ending for worker in self._workers.values()):
            self._rest_until = time.monotonic() + REST_S
            return
        self._failed_starts += 1
        if self._failed_starts >= FAILED_STARTS:
            self._failed_starts = 0
            for waiting in (*self._again, *self._waiting):
                _fail(waiting, reason)
            self._again.clear()
            self._waiting.clear()

    def _hand(self, worker: _Worker, item: Item) -> None:
        worker.item = item
        self._begin(worker, item)
        worker.jobs += 1
        worker.outbox = memoryview(b"".join(item.payload))
        self._exchange(worker, selectors.EVENT_WRITE)

    def _begin(self, worker: _Worker, item: Item) -> None:
        worker.turn = Turn(item, worker.pid, self._average_s.get(item.verifier, ASSUMED_S))

    def _exchange(self, worker: _Worker, events: int) -> None:
        try:
            if events & selectors.EVENT_READ:
                self._read(worker)
            if worker.outbox and worker.number in self._workers:
                worker.outbox = worker.outbox[worker.sock.send(worker.outbox) :]
        except BlockingIOError:
            pass
        except (OSError, EOFError, ValueError):
            self._hung_up(worker)
            return
        if worker.number in self._workers and not worker.ending:
            wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if worker.outbox else 0)
            if self._selector.get_key(worker.sock).events != wanted:
                self._selector.modify(worker.sock, wanted, self._selector.get_key(worker.sock).data)

    def _read(self, worker: _Worker) -> None:
        data = worker.sock.recv(1 << 16)
        if not data:
            raise EOFError
        for message in worker.inbox.feed(data):
            if "ready" in message:
                worker.ready, worker.due, self._failed_starts = True, 0.0, 0
            elif worker.item is None:
                raise ValueError("a word out of turn")
            elif "loading" in message:
                worker.turn, worker.due = None, time.monotonic() + LOAD_S
            elif "go" in message:
                worker.due = 0.0
                self._begin(worker, worker.item)
            else:
                self._judged(worker, worker.item, message)

    def _judged(self, worker: _Worker, item: Item, message: Message) -> None:
        if "failure" in message:
            _fail(item, message["failure"])
        else:
            if worker.turn is not None:
                average = self._average_s.get(item.verifier, ASSUMED_S)
                self._average_s[item.verifier] = average + (worker.turn.clock.look() - average) / 16
            item.future.set_result(Judgement(message["verdict"], message["why"], message["seconds"]))
        worker.item, worker.turn, worker.due = None, None, 0.0
        surplus = not self._waiting and sum(w.counts for w in self._workers.values()) > self._limit
        if worker.jobs >= JOBS or message.get("worn") or surplus:
            self._retire(worker)

    def _retire(self, worker: _Worker) -> None:
        """Its socket's end tells it to go."""
        worker.ending, worker.due = True, time.monotonic() + LAST_WORD_S
        self._selector.unregister(worker.sock)
        worker.sock.close()

    def _kill(self, worker: _Worker) -> None:
        if not worker.ending:
            self._retire(worker)
        worker.due = 0.0
        self._ask("kill", worker)

    def _hung_up(self, worker: _Worker) -> None:
        """How it ended, the nursery will say; if it is alive with a closed socket, it is of no use."""
        if not worker.ending:
            self._retire(worker)
            self._ask("kill", worker)

    def _ended(self, worker: _Worker, status: int | None, why: str = "it ended at once") -> None:
        """A worker is dead. Nobody of us killed it over its item, or the item would be gone."""
        if not worker.ending:
            with contextlib.suppress(OSError, EOFError, ValueError):
                while True:  # its last words
                    self._read(worker)
        self._workers.pop(worker.number, None)
        if not worker.ending:
            self._retire(worker)
        if not worker.ready:
            self._not_started(worker.meant_for, f"no worker can be started: {why}")
            return
        item, worker.item = worker.item, None
        turn, worker.turn = worker.turn, None
        if item is None:
            return
        if status == -_SIGXCPU:
            item.future.set_result(Judgement("timeout", "out of CPU time", turn.clock.wall_s if turn else 0.0))
        elif item.lost == 0:
            item.lost = 1
            self._again.append(item)
        else:
            how = "" if status is None else f" (signal {-status})" if status < 0 else f" (exit code {status})"
            _fail(item, f"two workers were lost over it{how}")

    # --- the nursery

    def _ask(self, what: str, worker: _Worker) -> None:
        """kill, stop, go."""
        if self._home is None:
            return
        try:
            self._home.kill(worker.number) if what == "kill" else self._home.signal(what, worker.number)
        except OSError:
            self._nursery_lost("it does not listen")

    def _hear(self, _: int) -> None:
        if self._home is None:
            return
        try:
            messages = self._home.heard()
        except EOFError:
            self._nursery_lost("")
            return
        for message in messages:
            self._told(message)

    def _told(self, message: dict[str, Any]) -> None:
        worker = self._workers.get(message.get("forked", message.get("ended", 0)))
        if worker is not None and "forked" in message:
            worker.pid = message["pid"]
        elif worker is not None:
            self._ended(worker, message["status"], message.get("why", "it ended at once"))

    def _nursery_lost(self, reason: str) -> None:
        """All its workers are lost with it. The next start makes a new one."""
        home, self._home = self._home, None
        if home is None:
            return
        self._selector.unregister(home.control)
        words = home.end([worker.pid for worker in self._workers.values() if worker.pid])
        workers = list(self._workers.values())
        if not any(worker.ready for worker in workers):
            self._failed_starts += 1
        for worker in workers:
            if not worker.ready and worker.meant_for is not None:
                self._again.append(worker.meant_for)
            if not worker.ready:
                worker.ready, worker.meant_for = True, None  # it never lived
            self._ended(worker, None)
        if self._failed_starts >= FAILED_STARTS:
            self._not_started(None, f"the workers' parent process cannot be started: {reason or words}")


def _wanted(item: Item) -> bool:
    """False: its result is there, or was cancelled. From now on it cannot be."""
    return item.future.running() or (not item.future.done() and item.future.set_running_or_notify_cancel())


def _fail(item: Item, reason: str) -> None:
    if _wanted(item):
        item.future.set_exception(VerifierFailure(reason))
