"""Measuring: accuracies, attack × purifier, the attack suite, rows, tables, checks of the evaluation itself."""
