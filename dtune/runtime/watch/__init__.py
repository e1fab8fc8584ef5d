"""The hang watchdog: signs of life, a watcher process beside each rank, and what ends a run.

A stopped rank cannot watch itself, and one that is stuck in native code with Python's lock cannot
either. So every rank has a small process beside it (``watcher``), which reads the rank's signs of
life from shared memory (``heartbeat``) and talks to the watchers of the other ranks over sockets of
its own. None of that goes through torch, the network of the collectives or Python's lock.

``heartbeat`` and ``client`` are what ranks use; ``watcher``, ``chair``, ``judge``, ``wire`` and
``stacks`` run in the watcher and import the standard library only.
"""
