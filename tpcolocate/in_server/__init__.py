"""What runs inside SGLang's TP workers; its folder goes on the server's PYTHONPATH, and it imports nothing of ours."""
