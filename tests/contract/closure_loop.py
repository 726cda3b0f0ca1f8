"""torch's closure contract, which knows neither micro-batches nor a scaler."""

from torch import nn

from tests.contract.problem import Run, Trained, micro_batches


class ClosureLoop:
    can: frozenset[str] = frozenset()

    def train(self, run: Run) -> Trained:
        trained = Trained.start(run)
        model = trained.model
        opt = trained.wrap(trained.base(), model)
        schedule = trained.schedule(opt)
        for x, y in micro_batches(run):

            def closure(x=x, y=y):
                opt.zero_grad()
                loss = model.loss(x, y)
                loss.backward()
                if run.clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), run.clip)
                return loss

            opt.step(closure)
            schedule.step()
        return trained
