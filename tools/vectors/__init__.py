"""Write the shipped vectors; programs in other languages that read them."""
