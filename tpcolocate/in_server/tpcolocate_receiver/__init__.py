"""Receives weights inside a TP worker, and verifies that they arrived.

SGLang calls `receive` in every TP worker for an ``/update_weights_from_tensor`` whose ``load_format`` names it (allowed
by ``--custom-weight-loader``).  The name of the one tensor in the request opens a session: it says which socket to
connect to for commands.  The weights themselves are in memory or in files that commands point to; see `protocol`.

Why not SGLang's own deserialisation: there, any exception (a handle that does not open, a wrong shape) kills the
server.  Here nothing is raised; errors are part of the reply, and the trainer decides.

Needs torch and pyzmq, and SGLang 0.5.9 or later.  The trainer imports some of the modules too.
"""

from .session import receive

__all__ = ["receive"]
