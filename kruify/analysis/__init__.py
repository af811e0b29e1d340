"""What a checkpoint costs and how its recurrent matrices behave; the check of a converted file."""
