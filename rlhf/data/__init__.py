"""What goes in: prompts and their order, chat templates, and assets fetched from the package index.

Owns: reading and checking prompt files (`prompts`), which prompt comes next (`ledger`), named assets (`assets`) and the tiny model
of the smoke run (`tiny`). Does not know: engines, rewards, training.
"""
