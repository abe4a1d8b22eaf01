"""The demo's prompts: short everyday questions, made from topics and forms."""

from __future__ import annotations

import numpy as np

TOPICS = (
    "baking bread", "growing tomatoes", "riding a bicycle", "learning the piano", "saving water",
    "keeping a diary", "planning a picnic", "choosing running shoes", "painting a wall",
    "cleaning windows", "cooking rice", "making tea", "training a puppy", "feeding birds in winter",
    "sleeping well", "packing a suitcase", "reading a map", "writing a letter", "using a library",
    "repairing a flat tyre", "washing wool", "storing potatoes", "taking photographs at night",
    "building a bookshelf", "swimming in the sea", "walking in the rain", "preparing for an exam",
    "learning a new language", "making new friends", "speaking in public", "saving money",
    "caring for houseplants", "climbing a mountain", "camping with children", "baking a cake",
    "drying herbs", "sharpening a knife", "folding shirts", "watching the stars", "keeping bees",
    "playing chess", "visiting a museum", "crossing a river", "making soup", "chopping onions",
    "stretching before sport", "mending a sweater", "sailing a small boat", "skating on ice",
    "recycling glass",
)  # fmt: skip

FORMS = (
    "Give me one tip about {topic}.",
    "In one sentence, why do people enjoy {topic}?",
    "What is the most common mistake when {topic}? Answer in one sentence.",
    "What do I need for {topic}? Answer briefly.",
    "Name one thing a beginner should know about {topic}.",
    "How much time does {topic} take? Answer in one sentence.",
    "Is {topic} difficult? Answer in one or two sentences.",
    "Tell me one fact about {topic}.",
    "What would you say to someone who is afraid of {topic}? One sentence.",
    "When is the best time of the year for {topic}? Answer briefly.",
    "What should I avoid when {topic}? Answer in one sentence.",
    "What can one learn from {topic}? One sentence, please.",
)

HELD_OUT_TOPICS = 12


def demo_prompts(seed: int) -> tuple[list[str], list[str]]:
    """(training prompts, held-out prompts), shuffled by the seed; no topic is on both sides."""
    rng = np.random.default_rng(seed)
    topics = [TOPICS[i] for i in rng.permutation(len(TOPICS))]
    sides = topics[HELD_OUT_TOPICS:], topics[:HELD_OUT_TOPICS]
    training, held_out = (
        [form.format(topic=topic) for topic in side for form in FORMS] for side in sides
    )
    return (
        [training[i] for i in rng.permutation(len(training))],
        [held_out[i] for i in rng.permutation(len(held_out))],
    )
