"""Inputs of the correctness benchmark: fixed before anything was measured with them.

The natural texts are in the public domain.
"""

QUESTIONS = (
    "What is the capital of France?",
    "Explain how a refrigerator works.",
    "Write a short poem about the sea.",
    "List three uses of copper.",
    "Who wrote Pride and Prejudice?",
    "Give me a recipe for pancakes.",
    "What causes rain?",
    "Translate 'good morning' into Spanish.",
    "Describe a typical day of a farmer.",
    "How do vaccines work?",
    "Write a Python function that reverses a string.",
    "What is the difference between a lake and a pond?",
    "Tell me a story about a lost dog.",
    "Why is the sky blue?",
    "Name the planets of the solar system.",
    "How can I learn to play the guitar?",
    "What is inflation in economics?",
    "Summarise the plot of Romeo and Juliet.",
    "What are the benefits of exercise?",
    "Explain photosynthesis to a child.",
)

NATURAL_TEXTS = (
    # Jane Austen, Pride and Prejudice (1813)
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of "
    "a wife. However little known the feelings or views of such a man may be on his first entering a neighbourhood, "
    "this truth is so well fixed in the minds of the surrounding families, that he is considered the rightful "
    "property of some one or other of their daughters.",
    # Abraham Lincoln, Gettysburg Address (1863)
    "Four score and seven years ago our fathers brought forth on this continent, a new nation, conceived in Liberty, "
    "and dedicated to the proposition that all men are created equal. Now we are engaged in a great civil war, "
    "testing whether that nation, or any nation so conceived and so dedicated, can long endure. We are met on a "
    "great battle-field of that war. We have come to dedicate a portion of that field, as a final resting place for "
    "those who here gave their lives that that nation might live.",
    # Herman Melville, Moby-Dick (1851)
    "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my purse, and "
    "nothing particular to interest me on shore, I thought I would sail about a little and see the watery part of "
    "the world. It is a way I have of driving off the spleen and regulating the circulation. Whenever I find myself "
    "growing grim about the mouth; whenever it is a damp, drizzly November in my soul; then, I account it high time "
    "to get to sea as soon as I can.",
    # Charles Darwin, On the Origin of Species (1859)
    "When on board H.M.S. Beagle, as naturalist, I was much struck with certain facts in the distribution of the "
    "inhabitants of South America, and in the geological relations of the present to the past inhabitants of that "
    "continent. These facts seemed to me to throw some light on the origin of species, that mystery of mysteries, as "
    "it has been called by one of our greatest philosophers. On my return home, it occurred to me, in 1837, that "
    "something might perhaps be made out on this question by patiently accumulating and reflecting on all sorts of "
    "facts which could possibly have any bearing on it.",
    # Lewis Carroll, Alice's Adventures in Wonderland (1865)
    "Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: once "
    "or twice she had peeped into the book her sister was reading, but it had no pictures or conversations in it, "
    "and what is the use of a book, thought Alice, without pictures or conversations? So she was considering in her "
    "own mind, as well as she could, for the hot day made her feel very sleepy and stupid, whether the pleasure of "
    "making a daisy-chain would be worth the trouble of getting up and picking the daisies, when suddenly a White "
    "Rabbit with pink eyes ran close by her.",
)
