"""How good a trained model is: `losses/` by position, what its layers choose (`routing/`), synthetic `tasks/`, tasks of
lm-eval (`lm_eval/`), and the page of a run (`report/`).

`evaluate_command` is the command, `subject` the model that its parts look at.
"""
