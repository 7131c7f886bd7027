"""What a person may do and see, and what people have done."""
