//! What a party serves: an encoder's programs, one a padded length, or a decoder's, one a step of a sequence.

use std::path::Path;
use std::sync::Arc;

use tacet_protocol::Error;
use tacet_protocol::model::{BertModel, is_encoder};
use tacet_protocol::plan::{DecoderPlanner, Keep, Planner, Progress, Shelf};
use tacet_protocol::program::Program;
use tacet_protocol::query::{LENGTHS, padded};

use crate::PartyError;

/// A planned model.
#[derive(Clone)]
pub enum Plans {
    /// A session is one program.
    Encoder(Arc<Planner>),
    /// A session is a sequence: a padded prompt, then a program a token.
    Decoder(Arc<DecoderPlanner>),
}

impl Plans {
    /// Loads and plans a model directory, or finds a large one's plan on the shelf; returns the model's digest too. An
    /// encoder's weights are always kept.
    ///
    /// # Errors
    /// What neither family takes, with the decoder's reason where the file says that it is one.
    pub fn load(
        dir: &Path,
        keep: Keep,
        shelf: Option<&Shelf>,
        told: &(dyn Fn(Progress) + Sync),
    ) -> Result<(Plans, [u8; 32]), PartyError> {
        if is_encoder(dir) {
            let model = BertModel::load(dir)?;
            return Ok((Plans::Encoder(Arc::new(Planner::new(&model)?)), model.digest()));
        }
        let (planner, embedding) = DecoderPlanner::load(dir, keep, shelf, told)?;
        Ok((Plans::Decoder(Arc::new(planner)), embedding.digest()))
    }

    /// The program of a text, or the first of a sequence, of a padded length.
    pub fn first(&self, tokens: usize) -> Result<Program, Error> {
        match self {
            Plans::Encoder(p) => p.program(tokens),
            Plans::Decoder(p) if LENGTHS.contains(&tokens) => p.program(true, 0, tokens, false),
            Plans::Decoder(_) => Err(Error::Plan {
                op: "input".into(),
                reason: format!("{tokens} is not a padded length; the next one is {}", padded(tokens).unwrap_or(0)),
            }),
        }
    }
}
