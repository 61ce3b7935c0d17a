"""Operations: what an operator sees and does. Logs, metrics, the file limit, the shutdown.

It imports the ground alone, and all packages but the engine and the store may import it.
Start reading at shutdown.py for how the process ends, at metrics.py for what is counted.
"""
