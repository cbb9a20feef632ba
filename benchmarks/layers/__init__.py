"""The parts of `native.py`: rows and rounds, what a row runs, the peers that are not torch.nn, the tables."""
