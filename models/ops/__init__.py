"""Operations: what an operator sees and does. Logs, metrics, the file limit, the shutdown.

It imports only the ground. All packages except the engine and the store may import it.
Start reading at shutdown.py for how the process ends, at metrics.py for what is counted.
"""
