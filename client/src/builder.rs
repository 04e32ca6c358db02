//! How a client is made: which parties, which model, and how patient and how parallel it is.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::try_join_all;
use tacet_protocol::model::BertModel;
use tacet_protocol::plan::{DecoderPlanner, Keep, Planner, Progress, Shelf};
use tacet_protocol::programs::Programs;
use tokenizers::Tokenizer;
use zeroize::Zeroizing;

use crate::target::Target;
use crate::{Client, ClientError, Generator, Parties};

/// Settings of a [`Client`]; parties and model are needed, the rest has defaults.
#[derive(Clone, Debug)]
pub struct ClientBuilder {
    parties: Option<Parties>,
    parties_file: Option<PathBuf>,
    model: Option<PathBuf>,
    deadline: Duration,
    concurrency: usize,
    retry_busy: bool,
    plans: Option<PathBuf>,
    planning: fn(Progress),
}

impl Default for ClientBuilder {
    fn default() -> Self {
        ClientBuilder {
            parties: None,
            parties_file: None,
            model: None,
            deadline: Duration::from_secs(90),
            concurrency: 4,
            retry_busy: true,
            plans: None,
            planning: |_| (),
        }
    }
}

impl ClientBuilder {
    /// Whom to ask.
    pub fn parties(mut self, parties: Parties) -> Self {
        self.parties = Some(parties);
        self
    }

    /// Whom to ask, from a `parties.toml`.
    pub fn parties_file(mut self, file: impl AsRef<Path>) -> Self {
        self.parties_file = Some(file.as_ref().to_path_buf());
        self
    }

    /// The model's directory, the same files as the parties'.
    pub fn model(mut self, dir: impl AsRef<Path>) -> Self {
        self.model = Some(dir.as_ref().to_path_buf());
        self
    }

    /// How long one text may take, waiting for full parties included; 90 seconds if not set.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Sessions that run at once in [`Client::embed`]; 4 if not set, 0 counts as 1.
    pub fn concurrency(mut self, sessions: usize) -> Self {
        self.concurrency = sessions.max(1);
        self
    }

    /// Whether a session that full parties refuse, before they used a share of it, is asked for again until the deadline;
    /// true if not set. Nothing else is ever tried again.
    pub fn retry_busy(mut self, retry: bool) -> Self {
        self.retry_busy = retry;
        self
    }

    /// Where plans of large decoders are kept between starts: to make one takes minutes for billions of weights, to read it
    /// a moment. They are kept nowhere if not set.
    pub fn plans(mut self, dir: impl AsRef<Path>) -> Self {
        self.plans = Some(dir.as_ref().to_path_buf());
        self
    }

    /// Whom to tell how a decoder's plan comes about.
    pub fn planning(mut self, told: fn(Progress)) -> Self {
        self.planning = told;
        self
    }

    /// Loads the model while all three parties are dialled at once.
    ///
    /// # Errors
    /// Which setting, file or party is the trouble.
    pub async fn connect(self) -> Result<Client, ClientError> {
        let client = self.load().await?;
        try_join_all(client.targets.iter().map(Target::connection)).await?;
        Ok(client)
    }

    /// Loads a decoder while all three parties are dialled at once.
    ///
    /// # Errors
    /// Which setting, file or party is the trouble.
    pub async fn generator(self) -> Result<Generator, ClientError> {
        let (deadline, told, shelf) = (self.deadline, self.planning, self.plans.as_ref().map(Shelf::new));
        let (targets, token, dir) = self.settings()?;
        let loaded = tokio::task::spawn_blocking(move || {
            let (planner, model) = DecoderPlanner::load(&dir, Keep::Shapes, shelf.as_ref(), &told)?;
            Ok::<_, ClientError>(Generator::new(planner, model, targets, token, deadline))
        })
        .await;
        let generator = loaded.map_err(|e| ClientError::Config(format!("loading: {e}")))??;
        generator.connect().await?;
        Ok(generator)
    }

    /// The parties, this client's token, and the model's directory.
    fn settings(&self) -> Result<(Vec<Target>, Zeroizing<String>, PathBuf), ClientError> {
        let missing = |what: &str| ClientError::Config(format!("a client needs {what}"));
        let parties = match (&self.parties, &self.parties_file) {
            (Some(p), None) => p.clone(),
            (None, Some(f)) => Parties::load(f)?,
            (None, None) => return Err(missing("its parties: ClientBuilder::parties or parties_file")),
            (Some(_), Some(_)) => return Err(missing("one source of parties, not parties and parties_file")),
        };
        parties.check()?;
        let dir = self.model.clone().ok_or_else(|| missing("the model's directory: ClientBuilder::model"))?;
        let targets = parties.party.iter().map(|p| Target::new(p, &parties.token)).collect::<Result<Vec<_>, _>>()?;
        Ok((targets, Zeroizing::new(parties.token.clone()), dir))
    }

    /// A client that has not dialled anyone yet.
    pub(crate) async fn load(self) -> Result<Client, ClientError> {
        let (targets, token, dir) = self.settings()?;
        // Reading and planning take a second or so; sockets go on meanwhile.
        let loaded = tokio::task::spawn_blocking(move || model(&dir)).await;
        let (model, planner, tokenizer) = loaded.map_err(|e| ClientError::Config(format!("loading: {e}")))??;
        Ok(Client {
            targets,
            token,
            model: Arc::new(model),
            planner,
            tokenizer,
            programs: Programs::default(),
            deadline: self.deadline,
            concurrency: self.concurrency,
            retry_busy: self.retry_busy,
        })
    }
}

fn model(dir: &Path) -> Result<(BertModel, Planner, Tokenizer), ClientError> {
    let model = BertModel::load(dir)?;
    let planner = Planner::new(&model)?;
    let file = dir.join("tokenizer.json");
    let bad = |e: tokenizers::Error| ClientError::Config(format!("{}: {e}", file.display()));
    let mut tokenizer = Tokenizer::from_file(&file).map_err(bad)?;
    tokenizer.with_padding(None);
    tokenizer.with_truncation(None).map_err(bad)?;
    Ok((model, planner, tokenizer))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn missing_settings_are_named() {
        let e = ClientBuilder::default().connect().await.unwrap_err().to_string();
        assert!(e.contains("parties_file"), "{e}");
        let e = ClientBuilder::default().parties_file("/nonexistent/p.toml").connect().await.unwrap_err().to_string();
        assert!(e.contains("/nonexistent/p.toml"), "{e}");
    }
}
