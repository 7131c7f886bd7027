"""What all pages share: who looks, how a page is rendered and answered, forms, words for times and
numbers.
"""
