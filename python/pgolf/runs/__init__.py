"""What a run leaves behind: its records, its report, its checkpoints, its folder."""
