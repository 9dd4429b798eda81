"""What a run would take, before it runs: memory, communication, and a dry run of every rank."""
