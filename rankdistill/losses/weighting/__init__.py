"""What each list counts in the losses: by difficulty, by the teacher's confidence, by agreement between teachers."""
