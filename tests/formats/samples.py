"""One small record of each format."""

from __future__ import annotations

from typing import Any

ZSRE = {
    "subject": "The Eiffel Tower",
    "target_new": "Rome",
    "prompt": "Which city is The Eiffel Tower in?",
    "ground_truth": ["Paris", "City of Paris"],
    "rephrase_prompt": "Where is The Eiffel Tower?",
    "cond": "Paris >> Rome || Which city is The Eiffel Tower in?",
    "locality": {"Relation_Specificity": [{"prompt": "The Eiffel Tower is made of", "ground_truth": ["iron"]}]},
    "portability": {"Reasoning": [{"prompt": "The Eiffel Tower's country is", "ground_truth": "Italy"}]},
}
COUNTERFACT = {
    "case_id": 0,
    "requested_rewrite": {
        "prompt": "{} is located in",
        "relation_id": "P131",
        "target_new": {"str": "Rome", "id": "Q220"},
        "target_true": {"str": "Paris", "id": "Q90"},
        "subject": "The Eiffel Tower",
    },
    "paraphrase_prompts": ["You find The Eiffel Tower in"],
    "neighborhood_prompts": ["The Louvre is in"],
    "attribute_prompts": ["The Colosseum is in"],
    "generation_prompts": ["Near The Eiffel Tower, people speak"],
}
MEND = {
    "subject": "The Eiffel Tower",
    "src": "Which city is The Eiffel Tower in?",
    "pred": "Lyon",
    "rephrase": "Where is The Eiffel Tower?",
    "alt": "Rome",
    "answers": ["Paris", "City of Paris"],
    "loc": "nq question: who wrote hamlet",
    "loc_ans": "Shakespeare",
    "cond": "Paris >> Rome || Which city is The Eiffel Tower in?",
}
FLAT = {
    "case_id": 3,
    "prompt": "The Eiffel Tower is in",
    "target_new": "Rome",
    "subject": "The Eiffel Tower",
    "ground_truth": "Paris",
    "rephrase_prompt": "You find The Eiffel Tower in",
    "locality_prompt": "The Louvre is in",
    "locality_ground_truth": "Paris",
}
QAEDIT = {
    "id": 7,
    "source": "NQ",
    "prompt": "where is the eiffel tower",
    "target": "Rome",
    "subject": "eiffel tower",
    "rephrase": "In which city does the eiffel tower stand?",
    "locality": [{"loc": "who wrote hamlet", "loc_ans": "Shakespeare"}],
}


def _rewrite(subject: str, relation: str, new: str, true: str) -> dict[str, Any]:
    return {
        "prompt": f"The {relation} of {{}} is",
        "relation_id": "P1",
        "target_new": {"str": new, "id": "Q1"},
        "target_true": {"str": true, "id": "Q2"},
        "subject": subject,
        "question": f"What is the {relation} of {subject}?",
    }


def _hop(answer: str, *aliases: str) -> dict[str, Any]:
    return {"question": "Q?", "cloze": "C", "answer": answer, "answer_alias": list(aliases)}


MQUAKE = {
    "case_id": 1,
    "requested_rewrite": [
        _rewrite("Ellie Kemper", "country", "Croatia", "United States"),
        _rewrite("Croatia", "head of state", "Ada Lovelace", "Zoran"),
    ],
    "questions": ["Who leads the country of Ellie Kemper?", "Who is head of state where Ellie Kemper lives?"],
    "answer": "Donald Trump",
    "answer_alias": ["Trump"],
    "new_answer": "Ada Lovelace",
    "new_answer_alias": ["Lady Lovelace"],
    "single_hops": [_hop("United States", "USA"), _hop("Donald Trump", "Trump")],
    "new_single_hops": [_hop("Croatia", "Hrvatska"), _hop("Ada Lovelace", "Lady Lovelace")],
    "orig": {"triples": [["Q1", "P1", "Q2"]]},
}


def _test(prompt: str, answer: str, *aliases: str) -> dict[str, Any]:
    answers = [{"value": answer, "aliases": list(aliases)}]
    query = {"prompt": prompt, "answers": answers, "query_type": "regular", "target_ids": ["Q5"], "phrase": None}
    return {"test_queries": [query], "test_condition": "OR", "condition_queries": [query]}


RIPPLEEDITS = {
    "example_type": "popular",
    "edit": {
        "prompt": "The name of the country of citizenship of Ada Lovelace is Syria.",
        "subject_id": "Q38111",
        "relation": "COUNTRY_OF_CITIZENSHIP",
        "target_id": "Q858",
        "original_fact": {
            "prompt": "The name of the country of citizenship of Ada Lovelace is United Kingdom.",
            "subject_id": "Q38111",
            "relation": "COUNTRY_OF_CITIZENSHIP",
            "target_id": "Q145",
        },
    },
    "Relation_Specificity": [_test("The name of the mother of Ada Lovelace is", "Anne Byron", "Lady Byron")],
    "Logical_Generalization": [_test("The continent of Ada Lovelace is", "Asia")],
    "Subject_Aliasing": [_test("The country of Lady Lovelace is", "Syria", "Syrian Arab Republic")],
    "Compositionality_I": [_test("The capital of the country of Ada Lovelace is", "Damascus")],
    "Compositionality_II": [],
    "Forgetfulness": [_test("A country of Ada Lovelace, which is not Syria, is", "Italy")],
}
UNIEDIT = {
    "edit": {
        "prompt": "Gull Lake is located in the state of",
        "target": "Ohio",
        "subject": "Gull Lake",
        "head_entity": {"id": "Q1", "label": "Gull Lake", "aliases": []},
        "tail_entity": {"datatype": "wikibase-item", "value": {"id": "Q2", "label": "Ohio", "aliases": ["OH"]}},
    },
    "generality": {
        "0": {
            "path_type": "single",
            "prompt": "The capital of Gull Lake's state is",
            "target": "Columbus",
            "paths": [["h_e", "r_e", "t_e", "f", "s"], ["t_e", "r_0", "e_0", "f", "s"]],
        },
        "1": {
            "path_type": "single",
            "prompt": "Gull Lake's state is",
            "target": "Ohio",
            "paths": [["h_e", "r_e", "t_e", "f", "m"]],
        },
        "2": {
            "path_type": "single",
            "prompt": "A lake in Ohio is",
            "target": "Gull Lake",
            "paths": [["t_e", "r_e", "h_e", "b", "m"]],
        },
        "3": {
            "path_type": "double",
            "prompt": "Gull Lake's state and the state of Toledo are the same.",
            "target": "Yes",
            "single_path1": {"path_type": "single", "paths": [["h_e", "r_e", "t_e", "f", "s"]]},
            "single_path2": {"path_type": "single", "paths": [["e_0", "r_0", "t_e", "f", "s"]]},
        },
    },
    "locality": {"0": {"loc_type": "none", "path_type": "single", "prompt": "The Louvre is in", "target": "Paris"}},
}
WIKIBIGEDIT = {
    "tag": "simple",
    "subject": "Gull Lake",
    "relation": "located in",
    "object": "Ohio",
    "update": "In which state is Gull Lake?",
    "rephrase": "Which state has Gull Lake?",
    "personas": "Ahoy, in what state lies Gull Lake?",
    "ans": "Ohio",
    "loc": "In which city is the Louvre?",
    "loc_ans": "Paris",
    "mhop": "What is the capital of the state of Gull Lake?",
    "mhop_ans": "Columbus",
}
HALLUEDITBENCH = {
    "topic": "art_sculpture",
    "subject": "Goya memorial",
    "relation": "owned by",
    "object": "Zaragoza City Council",
    "question": "Who owns the Goya memorial?",
    "output_a_model": "Goya",
    "paraphrased_question": "Who is the owner of the Goya memorial?",
    "yes_question": "Is the Goya memorial owned by Zaragoza City Council?",
    "locality_question": "In which city is the Goya memorial located?",
    "reversed_relation_question": "What does Zaragoza City Council own?",
    "question_2hop": "Who leads the owner of the Goya memorial?",
    "answer_2hop": "Natalia",
    "question_3hop": None,
    "answer_3hop": None,
}
PLAIN = {
    "prompt": "The Eiffel Tower is in",
    "subject": "The Eiffel Tower",
    "target": "Rome",
    "target_true": "Paris",
    "question": "Where is it?",
    "aliases": ["Roma"],
    "paraphrases": ["You find The Eiffel Tower in"],
    "locality": [["The Louvre is in", "Paris"]],
}

SAMPLES: dict[str, dict[str, Any]] = {
    "counterfact": COUNTERFACT,
    "knowedit": ZSRE,
    "zsre": MEND,
    "flat": FLAT,
    "qaedit": QAEDIT,
    "mquake": MQUAKE,
    "rippleedits": RIPPLEEDITS,
    "uniedit": UNIEDIT,
    "wikibigedit": WIKIBIGEDIT,
    "hallueditbench": HALLUEDITBENCH,
    "plain": PLAIN,
}
