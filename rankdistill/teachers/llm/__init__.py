"""Language models as teachers: prompts, windows, answers, the engines that answer, and what it all costs."""
