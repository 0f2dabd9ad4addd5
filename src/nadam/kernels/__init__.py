"""The rule compiled; knows no hyperparameters."""
