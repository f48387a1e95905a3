"""Speed and accuracy, measured: each benchmark is one command."""
