"""Takes weights inside a TP worker, and proves that they arrived.

SGLang calls `receive` in every TP worker for an ``/update_weights_from_tensor`` whose ``load_format`` names it (allowed
by ``--custom-weight-loader``).  The name of the one tensor that comes along is a small command: where to listen for
more.  The weights themselves lie in memory or in files that later commands point to.

Why not SGLang's own deserialisation: there, any exception (a handle that does not open, a wrong shape) kills the whole
server.  Here nothing is raised; what went wrong is answered, and the trainer decides.

Needs torch and pyzmq, and any SGLang from 0.5.9 on.  The trainer imports some of it too.
"""

from .session import receive

__all__ = ["receive"]
