"""What runs inside SGLang's TP workers: this folder goes on the server's PYTHONPATH, so it imports nothing of tpcolocate."""
