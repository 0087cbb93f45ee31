"""Adapters to the stacks that people already use; each is imported only on demand."""
