"""Who asks for something, what that person may do and see, and what people have done."""
