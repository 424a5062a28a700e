"""Ready-made tasks; data is opened here and nowhere else."""
