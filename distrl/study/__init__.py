"""Studies: many trainings that answer one question with one table and one picture."""
